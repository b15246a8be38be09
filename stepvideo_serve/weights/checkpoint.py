"""A checkpoint in the official layout, and every network of it loaded strictly.

    transformer/  config.json, diffusion_pytorch_model*.safetensors[.index.json]
    vae/          vae_v2.safetensors
    step_llm/     config.json, model*.safetensors[.index.json], step1_chat_tokenizer.model
    hunyuan_clip/ clip_text_encoder/{config.json, model.safetensors | pytorch_model.bin}, tokenizer/vocab.txt

Networks are built on the meta device, their keys and shapes compared with the files' headers, and only then are
tensors mapped in. The DiT can be had block by block, so that nothing ever needs all of it.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from stepvideo_serve.dit.blocks import DiTBlock
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.text.step_llm import StepLLM, StepLLMConfig
from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.decoder import VideoDecoder
from stepvideo_serve.vae.encoder import VideoEncoder
from stepvideo_serve.vae.model import VideoVAE
from stepvideo_serve.weights.files import WeightFiles, file_digest, open_weights

if TYPE_CHECKING:  # transformers takes seconds to import, and most of the server's processes need no text encoder
    from transformers import BertConfig

    from stepvideo_serve.text.hunyuan_clip import HunyuanClip
    from stepvideo_serve.text.tokenizers import ClipTokenizer, StepTokenizer

M = TypeVar("M", bound=nn.Module)
BLOCKS_PREFIX = "transformer_blocks."


class Checkpoint:
    """Opens lazily: each part is checked when it is first asked for. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"The model directory {folder} must exist, found no such folder.")
        self.folder = folder
        self._digests: dict[Path, str] = {}

    @cached_property
    def dit_config(self) -> DiTConfig:
        return DiTConfig.load(self.folder / "transformer" / "config.json")

    @cached_property
    def llm_config(self) -> StepLLMConfig:
        return StepLLMConfig.load(self.folder / "step_llm" / "config.json")

    @cached_property
    def clip_config(self) -> "BertConfig":
        from stepvideo_serve.text.hunyuan_clip import load_clip_config

        return load_clip_config(self.folder / "hunyuan_clip" / "clip_text_encoder" / "config.json")

    @cached_property
    def vae_config(self) -> VAEConfig:
        return VAEConfig.from_shapes(self._vae_files.shapes, str(self.folder / "vae"))

    def step_tokenizer(self) -> "StepTokenizer":
        from stepvideo_serve.text.tokenizers import StepTokenizer

        return StepTokenizer(self.folder / "step_llm" / "step1_chat_tokenizer.model")

    def clip_tokenizer(self) -> "ClipTokenizer":
        from stepvideo_serve.text.tokenizers import ClipTokenizer

        return ClipTokenizer(self.folder / "hunyuan_clip" / "tokenizer")

    def dit(self, dtype: torch.dtype = torch.float32) -> StepVideoDiT:
        return load_module(lambda: StepVideoDiT(self.dit_config), self._dit_files, dtype)

    def dit_outer(self, dtype: torch.dtype = torch.float32) -> StepVideoDiT:
        """Everything of the DiT but its blocks."""

        def build() -> StepVideoDiT:
            outer = StepVideoDiT(self.dit_config)
            outer.transformer_blocks = nn.ModuleList()
            return outer

        return load_module(build, self._dit_files, dtype, ignore=BLOCKS_PREFIX)

    def dit_block(self, index: int, dtype: torch.dtype = torch.float32) -> DiTBlock:
        prefix = f"{BLOCKS_PREFIX}{index}."
        return load_module(lambda: DiTBlock(self.dit_config.width), self._dit_files, dtype, prefix=prefix)

    def step_llm(self, dtype: torch.dtype = torch.float32) -> StepLLM:
        return load_module(lambda: StepLLM(self.llm_config), self._llm_files, dtype)

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

    def digest(self, part: str, prefix: str = "") -> str:
        """SHA-256 over the contents of the weight files that hold the keys of `part` ("dit", "llm", "clip", "vae")
        starting with `prefix`. Files are hashed once."""
        files = {"dit": "_dit_files", "llm": "_llm_files", "clip": "_clip_files", "vae": "_vae_files"}
        table: WeightFiles = getattr(self, files[part])
        paths = sorted({path for key, path in table.file_of.items() if key.startswith(prefix)})
        for path in paths:
            if path not in self._digests:
                self._digests[path] = file_digest(path)
        return hashlib.sha256("".join(self._digests[path] for path in paths).encode()).hexdigest()

    @cached_property
    def _dit_files(self) -> WeightFiles:
        files = open_weights(self.folder / "transformer", rename=lambda key: key)
        compare_keys(meta_shapes(lambda: StepVideoDiT(self.dit_config)), files, files.shapes)
        return files

    @cached_property
    def _llm_files(self) -> WeightFiles:
        return open_weights(self.folder / "step_llm", rename=lambda key: key)

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
) -> M:
    """Builds on the meta device and maps in the keys that start with `prefix` (but not with `ignore`), under their
    names without it and with `into` in front. Evaluation mode, no gradients. Raises CheckpointError."""
    with torch.device("meta"):
        module = build()
    keys = [key for key in files.shapes if key.startswith(prefix) and (ignore is None or not key.startswith(ignore))]
    expected = {prefix + name.removeprefix(into): tuple(t.shape) for name, t in module.state_dict().items()}
    compare_keys(expected, files, keys)
    state = {into + key.removeprefix(prefix): tensor for key, tensor in files.read(keys, dtype)}
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def meta_shapes(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a network, without its memory."""
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}


def compare_keys(expected: dict[str, tuple[int, ...]], files: WeightFiles, keys: Iterable[str]) -> None:
    """Raises CheckpointError naming the first missing, unexpected or misshapen key, and its file."""
    present = set(keys)
    where = ", ".join(sorted({str(path) for path in files.file_of.values()}))
    if missing := sorted(expected.keys() - present):
        raise CheckpointError(f"{where} must hold {missing[0]}, which is missing ({len(missing)} keys are).")
    if extra := sorted(present - expected.keys()):
        raise CheckpointError(
            f"{files.file_of[extra[0]]} holds {extra[0]}, which is not part of the model ({len(extra)} keys are not)."
        )
    for key, shape in expected.items():
        if files.shapes[key] != shape:
            raise CheckpointError(
                f"{files.file_of[key]} must hold {key} with shape {list(shape)}, found {list(files.shapes[key])}: "
                "the weights and the configuration belong to different models."
            )


def _vae_key(key: str) -> str:
    """The file names the decoder's last convolution without the `.conv` level that all others have."""
    old, new = "decoder.conv_out.", "decoder.conv_out.conv."
    return new + key.removeprefix(old) if key.startswith(old) and not key.startswith(new) else key


def _clip_key(key: str) -> str | None:
    """Drops what BERT files carry beside the encoder: the pretraining head and a table of positions."""
    key = key.removeprefix("bert.")
    return None if key.startswith("cls.") or key.endswith("position_ids") else key
