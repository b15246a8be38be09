"""Dimensions of a small random checkpoint, and its JSON files with the official field names."""

from dataclasses import dataclass
from typing import Any

from transformers import BertConfig

from export.tiny.tokenizers import STEP_PIECES, clip_vocabulary
from stepvideo_serve.assembly.checkpoint import meta_shapes
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.errors import ExportError
from stepvideo_serve.text.hunyuan_clip import HunyuanClip
from stepvideo_serve.text.states import CLIP_TOKENS
from stepvideo_serve.text.step_llm import FFN_ROUNDING, StepLLM, StepLLMConfig
from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.model import VideoVAE

PartShapes = dict[str, tuple[int, ...]]

MODEL_INDEX = {
    "_class_name": "StepVideoPipeline",
    "scheduler": ["stepvideo", "FlowMatchDiscreteScheduler"],
    "transformer": ["stepvideo", "StepVideoModel"],
}
SCHEDULER = {
    "_class_name": "FlowMatchDiscreteScheduler",
    "num_train_timesteps": 1000,
    "reverse": False,
    "solver": "euler",
}


@dataclass(frozen=True)
class ClipDims:
    """Dimensions of the BERT; its vocabulary is that of the tokenizer."""

    width: int
    num_heads: int
    num_layers: int
    ffn_width: int
    max_positions: int


TINY_DIT = DiTConfig(
    num_heads=3, num_layers=3, in_channels=8, out_channels=8, patch_size=1, llm_channels=96, clip_channels=64
)
TINY_LLM = StepLLMConfig(
    width=96, num_heads=6, num_groups=2, num_layers=3, ffn_width=256, vocab_size=768, norm_eps=1e-5
)
TINY_CLIP = ClipDims(width=64, num_heads=4, num_layers=2, ffn_width=160, max_positions=96)
TINY_VAE = VAEConfig(
    z_channels=8,
    num_res_blocks=1,
    encoder_stem=64,
    encoder_widths=(64, 64, 96, 64),
    decoder_widths=(64, 64, 64, 96),
)


@dataclass(frozen=True)
class TinyConfig:
    """Dimensions of all four networks, and the number of files that the DiT's weights are divided into.

    The defaults are small, and still such that mistakes show: 3 heads, and 6 heads in 2 groups, are no powers of two,
    the networks' widths differ, and no normalisation group of the VAE has a single channel, since that would cancel
    the biases of its convolutions. Raises ExportError when the networks do not fit together.
    """

    dit: DiTConfig = TINY_DIT
    llm: StepLLMConfig = TINY_LLM
    clip: ClipDims = TINY_CLIP
    vae: VAEConfig = TINY_VAE
    dit_shards: int = 2

    def __post_init__(self) -> None:
        taken = (self.dit.llm_channels, self.dit.clip_channels, self.dit.in_channels)
        given = (self.llm.width, self.clip.width, self.vae.z_channels)
        if taken != given:
            raise ExportError(
                f"The DiT must take the widths {given} of the LLM, CLIP and VAE, got {taken}: change one."
            )
        if self.llm.vocab_size < STEP_PIECES or self.clip.max_positions < CLIP_TOKENS:
            raise ExportError(
                f"Tiny text encoders need a vocabulary of {STEP_PIECES} and {CLIP_TOKENS} positions or more, "
                f"got {self.llm.vocab_size} and {self.clip.max_positions}: raise them."
            )

    def shapes(self) -> dict[str, PartShapes]:
        """Keys under the modules' names, and shapes, of "dit", "llm", "clip" (as in its file) and "vae"."""
        bert = BertConfig.from_dict(clip_json(self.clip))
        clip = meta_shapes(lambda: HunyuanClip(bert))
        return {
            "dit": meta_shapes(lambda: StepVideoDiT(self.dit)),
            "llm": meta_shapes(lambda: StepLLM(self.llm)),
            "clip": {key.removeprefix("bert."): shape for key, shape in clip.items()},
            "vae": meta_shapes(lambda: VideoVAE(self.vae)),
        }


def llm_json(config: StepLLMConfig) -> dict[str, Any]:
    """`step_llm/config.json`."""
    return {
        "architectures": ["Step1Model"],
        "attention_impl": "GQA",
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_attention_groups": config.num_groups,
        "kv_channels": config.head_dim,
        "num_layers": config.num_layers,
        "ffn_hidden_size": config.ffn_width - FFN_ROUNDING // 4,  # the model rounds it up
        "layernorm_epsilon": config.norm_eps,
        "orig_vocab_size": STEP_PIECES,
        "padded_vocab_size": config.vocab_size,
        "torch_dtype": "bfloat16",
    }


def clip_json(config: ClipDims) -> dict[str, Any]:
    """`hunyuan_clip/clip_text_encoder/config.json`."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": len(clip_vocabulary()),
    }
