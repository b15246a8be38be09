"""A checkpoint in the official layout, and every network of it loaded strictly.

    transformer/  config.json, diffusion_pytorch_model*.safetensors[.index.json]
    vae/          vae_v2.safetensors
    step_llm/     config.json, model*.safetensors[.index.json], step1_chat_tokenizer.model
    hunyuan_clip/ clip_text_encoder/{config.json, model.safetensors | pytorch_model.bin}, tokenizer/vocab.txt

Networks are built on the meta device, their keys and shapes compared with the files' headers, and only then are
tensors mapped in. The DiT can be had block by block and Step-LLM layer by layer, both in slices for tensor parallelism,
so that nothing ever needs all of a network, and a rank reads its slices only.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from stepvideo_serve.dit.blocks import DiTBlock
from stepvideo_serve.dit.config import BLOCKS_PREFIX, DiTConfig
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.dit.sharding import dit_plan
from stepvideo_serve.engine.manifest import content_key
from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.text.segments import LlmAttention, LlmEmbed, LlmFeedForward, LlmLayer
from stepvideo_serve.text.sharding import llm_plan
from stepvideo_serve.text.step_llm import LAYERS_PREFIX, StepLLM, StepLLMConfig
from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.model import VideoDecoder, VideoEncoder, VideoVAE
from stepvideo_serve.weights.cuts import WHOLE, Cut, Shape, ShardPlan, TensorPart
from stepvideo_serve.weights.files import NO_CUTS, WeightFiles, file_digest, open_weights
from stepvideo_serve.weights.json_file import integer, read_json_object, require_model_dir
from stepvideo_serve.weights.whole_file import check_whole

if TYPE_CHECKING:  # transformers takes seconds to import, and most of the server's processes need no text encoder
    from transformers import BertConfig

    from stepvideo_serve.text.hunyuan_clip import HunyuanClip
    from stepvideo_serve.text.tokenizers import ClipTokenizer, StepTokenizer

M = TypeVar("M", bound=nn.Module)
LLM_EMBED_PREFIX = "tok_embeddings."
DIT_CONFIG = Path("transformer", "config.json")
LLM_CONFIG = Path("step_llm", "config.json")
CLIP_CONFIG = Path("hunyuan_clip", "clip_text_encoder", "config.json")
STEP_TOKENIZER = Path("step_llm", "step1_chat_tokenizer.model")
CLIP_TOKENIZER = Path("hunyuan_clip", "tokenizer")
CLIP_TOKENIZER_FILES = (
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
CONFIGS: Mapping[str, Path] = MappingProxyType({"dit": DIT_CONFIG, "llm": LLM_CONFIG, "clip": CLIP_CONFIG})
TOKENIZERS = "tokenizers"
PARTS = ("dit", "llm", "clip", "vae", TOKENIZERS)


class Checkpoint:
    """Opens lazily: each part is checked when it is first asked for. `digest_of` gives the SHA-256 of a file. Raises
    CheckpointError."""

    def __init__(self, folder: Path, digest_of: Callable[[Path], str] = file_digest) -> None:
        require_model_dir(folder)
        self.folder, self._digest_of = folder, digest_of
        self._digests: dict[Path, str] = {}

    @cached_property
    def dit_config(self) -> DiTConfig:
        return DiTConfig.load(self.folder / DIT_CONFIG)

    @cached_property
    def llm_config(self) -> StepLLMConfig:
        return StepLLMConfig.load(self.folder / LLM_CONFIG)

    @cached_property
    def clip_config(self) -> "BertConfig":
        from stepvideo_serve.text.hunyuan_clip import load_clip_config

        return load_clip_config(self.folder / CLIP_CONFIG)

    @cached_property
    def vae_config(self) -> VAEConfig:
        return VAEConfig.from_shapes(self._vae_files.shapes, str(self.folder / "vae"))

    def step_tokenizer(self) -> "StepTokenizer":
        from stepvideo_serve.text.tokenizers import StepTokenizer

        values = read_json_object(self.folder / LLM_CONFIG)
        # Embeddings are padded to a multiple of what the training liked; the tokenizer has the original count.
        name = "orig_vocab_size" if "orig_vocab_size" in values else "padded_vocab_size"
        return StepTokenizer(self.folder / STEP_TOKENIZER, integer(values, name, str(self.folder / LLM_CONFIG)))

    def clip_tokenizer(self) -> "ClipTokenizer":
        from stepvideo_serve.text.tokenizers import ClipTokenizer

        config = self.clip_config
        return ClipTokenizer(self.folder / CLIP_TOKENIZER, config.vocab_size, config.pad_token_id or 0)

    def dit(self, dtype: torch.dtype = torch.float32) -> StepVideoDiT:
        return load_module(lambda: StepVideoDiT(self.dit_config), self._dit_files, dtype)

    def dit_outer(self, dtype: torch.dtype = torch.float32) -> StepVideoDiT:
        """Everything of the DiT but its blocks."""

        def build() -> StepVideoDiT:
            outer = StepVideoDiT(self.dit_config)
            outer.transformer_blocks = nn.ModuleList()
            return outer

        return load_module(build, self._dit_files, dtype, ignore=BLOCKS_PREFIX)

    def dit_block(self, index: int, dtype: torch.dtype = torch.float32, part: TensorPart = WHOLE) -> DiTBlock:
        """Block `index`, or a slice of its heads and hidden channels. Raises SetupError when they do not divide."""
        prefix = f"{BLOCKS_PREFIX}{index}."
        cuts = cuts_below(prefix, self._dit_files, self._dit_plan, part)
        width = self.dit_config.width
        return load_module(lambda: DiTBlock(width, part.count), self._dit_files, dtype, prefix=prefix, cuts=cuts)

    def step_llm(self, dtype: torch.dtype = torch.float32, part: TensorPart = WHOLE) -> StepLLM:
        """All of it, or a slice of every layer's groups and hidden channels. Raises SetupError when they do not
        divide."""
        cuts = cuts_below("", self._llm_files, self._llm_plan, part)
        return load_module(lambda: StepLLM(self.llm_config, part.count), self._llm_files, dtype, cuts=cuts)

    def llm_embed(self, dtype: torch.dtype = torch.float32) -> LlmEmbed:
        """Step-LLM's token embeddings."""
        return load_module(lambda: LlmEmbed(self.llm_config), self._llm_files, dtype, only=(LLM_EMBED_PREFIX,))

    def llm_attention(self, index: int, dtype: torch.dtype = torch.float32, part: TensorPart = WHOLE) -> LlmAttention:
        """Attention of layer `index`, or a slice of its groups."""
        prefix, names = f"{LAYERS_PREFIX}{index}.", ("attention_norm.", "attention.")
        cuts = cuts_below(prefix, self._llm_files, self._llm_plan, part)
        config, files = self.llm_config, self._llm_files
        return load_module(lambda: LlmAttention(config, part), files, dtype, prefix=prefix, only=names, cuts=cuts)

    def llm_feed_forward(
        self, index: int, dtype: torch.dtype = torch.float32, part: TensorPart = WHOLE
    ) -> LlmFeedForward:
        """Feed-forward of layer `index`, or a slice of its hidden channels."""
        prefix, names = f"{LAYERS_PREFIX}{index}.", ("ffn_norm.", "feed_forward.")
        cuts = cuts_below(prefix, self._llm_files, self._llm_plan, part)
        config, files = self.llm_config, self._llm_files
        return load_module(
            lambda: LlmFeedForward(config, part.count), files, dtype, prefix=prefix, only=names, cuts=cuts
        )

    def clip(self, dtype: torch.dtype = torch.float32) -> "HunyuanClip":
        from stepvideo_serve.text.hunyuan_clip import HunyuanClip

        module = load_module(lambda: HunyuanClip(self.clip_config), self._clip_files, dtype, into="bert.")
        embeddings = module.bert.embeddings
        positions = torch.arange(embeddings.position_embeddings.num_embeddings)[None]
        embeddings.register_buffer("position_ids", positions, persistent=False)
        embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
        return module

    def vae_encoder(self, dtype: torch.dtype = torch.float32) -> VideoEncoder:
        self._check_vae()
        return load_module(lambda: VideoEncoder(self.vae_config), self._vae_files, dtype, prefix="encoder.")

    def vae_decoder(self, dtype: torch.dtype = torch.float32) -> VideoDecoder:
        self._check_vae()
        return load_module(lambda: VideoDecoder(self.vae_config), self._vae_files, dtype, prefix="decoder.")

    def check(self, part: str) -> None:
        """Compares the weights of `part` (one of PARTS but the tokenizers) with its configuration, by the files'
        headers. Raises CheckpointError."""
        if part == "vae":
            self._check_vae()
            return
        config, files = f"{part}_config", f"_{part}_files"
        getattr(self, config)
        getattr(self, files)

    def llm_layer(self, index: int, dtype: torch.dtype = torch.float32) -> LlmLayer:
        """All of layer `index`."""
        prefix, config, files = f"{LAYERS_PREFIX}{index}.", self.llm_config, self._llm_files
        return load_module(lambda: LlmLayer(config), files, dtype, prefix=prefix)

    def tensors(
        self, part: str, keys: Collection[str], dtype: torch.dtype, share: TensorPart = WHOLE
    ) -> dict[str, Tensor]:
        """Tensors by their keys in the checkpoint; `part`: "dit", "llm" or "clip". Of the first two only the slice
        `share`. Tensors stored in `dtype` are mapped into memory, others converted. Raises CheckpointError for a key
        that is missing."""
        files = self._files(part)
        _require_keys(files, keys)
        return dict(files.read(keys, dtype, self._cuts(part, keys, share)))

    def shape(self, part: str, key: str) -> Shape:
        """Of one tensor, whole. Raises CheckpointError where it is missing."""
        files = self._files(part)
        _require_keys(files, [key])
        return files.shapes[key]

    def cut(self, part: str, key: str, share: TensorPart) -> Cut | None:
        """What a tensor-parallel rank holds of a tensor; None for all of it."""
        return self._cuts(part, (key,), share).get(key)

    def cut_axis(self, part: str, key: str, count: int) -> int | None:
        """The axis along which each of `count` ranks has a share of the tensor; None where each has all of it."""
        cuts = self._cuts(part, (key,), TensorPart(0, count))
        return cuts[key].dim if key in cuts else None

    def _cuts(self, part: str, keys: Iterable[str], share: TensorPart) -> dict[str, Cut]:
        if part not in ("dit", "llm"):
            return {}
        plan = self._dit_plan if part == "dit" else self._llm_plan
        shapes = self._files(part).shapes
        return plan.cuts({key: shapes[key] for key in keys}, share)

    def _files(self, part: str) -> WeightFiles:
        files = {"dit": "_dit_files", "llm": "_llm_files", "clip": "_clip_files", "vae": "_vae_files"}
        table: WeightFiles = getattr(self, files[part])
        return table

    def digest(self, part: str, prefix: str = "") -> str:
        """SHA-256 over what decides the results of `part` (one of PARTS): the weight files that hold its keys starting
        with `prefix`, and its configuration; of "tokenizers" their files. Files are hashed once."""
        if part == TOKENIZERS:
            return content_key(**{name: self.settings[name] for name in ("step_tokenizer", "clip_tokenizer")})
        table = self._files(part)
        paths = sorted({path for key, path in table.file_of.items() if key.startswith(prefix)})
        weights = [self._file_digest(path) for path in paths]
        return content_key(weights=weights, config=self._config_digest(part) if part in CONFIGS else None)

    @property
    def identity(self) -> str:
        """Of all parts together: what manifests call the checkpoint."""
        return content_key(**{part: self.digest(part) for part in PARTS})

    @cached_property
    def settings(self) -> dict[str, str]:
        """Digests of what decides the results besides the weights, by name; cheap, so servers compare them with those
        of the exported graphs. Raises CheckpointError when a file is absent or a pointer of Git LFS."""
        clip = [self.folder / CLIP_TOKENIZER / name for name in CLIP_TOKENIZER_FILES]
        clip = [path for path in clip if path.name == "vocab.txt" or path.is_file()]
        return {
            **{f"{part}_config": self._config_digest(part) for part in CONFIGS},
            "step_tokenizer": self._file_digest(self.folder / STEP_TOKENIZER),
            "clip_tokenizer": content_key(**{path.name: self._file_digest(path) for path in clip}),
        }

    def _config_digest(self, part: str) -> str:
        """Of the values, whatever their order; notes of the tool that wrote the file do not count."""
        values = read_json_object(self.folder / CONFIGS[part])
        return content_key(**{k: v for k, v in values.items() if k[0] != "_" and k != "transformers_version"})

    def _file_digest(self, path: Path) -> str:
        if path not in self._digests:
            check_whole(path)
            try:
                self._digests[path] = self._digest_of(path)
            except OSError as error:
                raise CheckpointError(f"{path} must be a file of the checkpoint: {error.strerror}.") from None
        return self._digests[path]

    @cached_property
    def _dit_files(self) -> WeightFiles:
        files = open_weights(self.folder / "transformer", rename=lambda key: key)
        compare_keys(meta_shapes(lambda: StepVideoDiT(self.dit_config)), files, files.shapes)
        return files

    @cached_property
    def _llm_files(self) -> WeightFiles:
        files = open_weights(self.folder / "step_llm", rename=lambda key: key)
        compare_keys(meta_shapes(lambda: StepLLM(self.llm_config)), files, files.shapes)
        return files

    @cached_property
    def _dit_plan(self) -> ShardPlan:
        return checked(dit_plan(self.dit_config), self._dit_files)

    @cached_property
    def _llm_plan(self) -> ShardPlan:
        return checked(llm_plan(self.llm_config), self._llm_files)

    @cached_property
    def _clip_files(self) -> WeightFiles:
        return open_weights(self.folder / "hunyuan_clip" / "clip_text_encoder", rename=_clip_key)

    @cached_property
    def _vae_files(self) -> WeightFiles:
        return open_weights(self.folder / "vae", rename=_vae_key, single="vae_v2.safetensors")

    def _check_vae(self) -> None:
        compare_keys(meta_shapes(lambda: VideoVAE(self.vae_config)), self._vae_files, self._vae_files.shapes)


def load_module(
    build: Callable[[], M],
    files: WeightFiles,
    dtype: torch.dtype,
    prefix: str = "",
    ignore: str | None = None,
    into: str = "",
    only: tuple[str, ...] = ("",),
    cuts: Mapping[str, Cut] = NO_CUTS,
) -> M:
    """Builds on the meta device and maps in the keys that start with `prefix` and then one of `only` (but not with
    `ignore`), under their names without the prefix and with `into` in front; of those in `cuts` the part that is
    wanted. Evaluation mode, no gradients. Raises CheckpointError."""
    with torch.device("meta"):
        module = build()
    starts = tuple(prefix + name for name in only)
    keys = [key for key in files.shapes if key.startswith(starts) and (ignore is None or not key.startswith(ignore))]
    expected = {prefix + name.removeprefix(into): tuple(t.shape) for name, t in module.state_dict().items()}
    compare_keys(expected, files, keys, cuts)
    state = {into + key.removeprefix(prefix): tensor for key, tensor in files.read(keys, dtype, cuts)}
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def checked(plan: ShardPlan, files: WeightFiles) -> ShardPlan:
    """The plan. Raises SetupError when it does not cover exactly the keys of `files`."""
    plan.check(files.shapes)
    return plan


def cuts_below(prefix: str, files: WeightFiles, plan: ShardPlan, part: TensorPart) -> dict[str, Cut]:
    """How `part` is cut from the tensors whose keys start with `prefix`. Raises SetupError."""
    return plan.cuts({key: shape for key, shape in files.shapes.items() if key.startswith(prefix)}, part)


def meta_shapes(build: Callable[[], nn.Module]) -> dict[str, Shape]:
    """Keys and shapes of a network, without its memory."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}


def compare_keys(
    expected: dict[str, Shape], files: WeightFiles, keys: Iterable[str], cuts: Mapping[str, Cut] = NO_CUTS
) -> None:
    """Raises CheckpointError naming the first missing, unexpected or misshapen key, and its file; `expected` shapes are
    those after the cuts."""
    present = set(keys)
    where = ", ".join(sorted({str(path) for path in files.file_of.values()}))
    if missing := sorted(expected.keys() - present):
        raise CheckpointError(f"{where} must hold {missing[0]}, which is missing ({len(missing)} keys are).")
    if extra := sorted(present - expected.keys()):
        raise CheckpointError(
            f"{files.file_of[extra[0]]} holds {extra[0]}, which is not part of the model ({len(extra)} keys are not)."
        )
    for key, shape in expected.items():
        found = cuts[key].shape(files.shapes[key]) if key in cuts else files.shapes[key]
        if found != shape:
            raise CheckpointError(
                f"{files.file_of[key]} must hold {key} with shape {list(shape)}, found {list(found)}: "
                "the weights and the configuration belong to different models."
            )


def _require_keys(files: WeightFiles, keys: Iterable[str]) -> None:
    if missing := [key for key in keys if key not in files.shapes]:
        where = ", ".join(sorted({str(path) for path in files.file_of.values()}))
        raise CheckpointError(f"{where} must hold {missing[0]}, which is missing ({len(missing)} keys are).")


def _vae_key(key: str) -> str:
    """The file names the decoder's last convolution without the `.conv` level that all others have."""
    old, new = "decoder.conv_out.", "decoder.conv_out.conv."
    return new + key.removeprefix(old) if key.startswith(old) and not key.startswith(new) else key


def vae_file_key(key: str) -> str:
    """The inverse: a key of the module as the file has it."""
    return key.replace("decoder.conv_out.conv.", "decoder.conv_out.")


def _clip_key(key: str) -> str | None:
    """Drops what BERT files carry beside the encoder: the pretraining head and a table of positions."""
    key = key.removeprefix("bert.")
    return None if key.startswith("cls.") or key.endswith("position_ids") else key
