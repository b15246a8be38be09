"""A model and a request as far as memory and cost go: numbers only, from which the ledger and the planner compute."""

from collections.abc import Mapping
from dataclasses import dataclass

from stepvideo_serve.parallel.layout import Layout

GIB = 2**30
BF16_BYTES = 2
FP32_BYTES = 4
WEIGHT_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "nvfp4": 1}
"""By precision, of the matrices that tensor parallelism cuts. NVFP4 takes less than FP8, and is counted as that."""
VALUE_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2, "nvfp4": 2}
"""Likewise, of all other weights and of activations."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: those that tensor parallelism cuts, and those that every rank holds."""

    cut: int
    whole: int

    def bytes(self, tp: int, precision: str) -> int:
        """Of one rank's share."""
        return self.cut // tp * WEIGHT_BYTES[precision] + self.whole * VALUE_BYTES[precision]


@dataclass(frozen=True)
class Widths:
    """Of the DiT, as far as what lies between its graphs goes."""

    width: int
    head_dim: int
    layers: int


@dataclass(frozen=True)
class ModelSize:
    """The model as far as its cost goes.

    hidden: width of the feed-forward; patch_in, patch_out: values per token that enter (latent and condition) and
    leave; time_channels: of the sinusoids; llm_groups: key/value groups, which tp must divide to cut Step-LLM.
    """

    width: int
    heads: int
    layers: int
    hidden: int
    patch_in: int
    patch_out: int
    time_channels: int
    dit: Parameters
    llm: Parameters
    llm_groups: int
    clip_parameters: int
    vae_encoder_parameters: int
    vae_decoder_parameters: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def widths(self) -> Widths:
        return Widths(self.width, self.head_dim, self.layers)


@dataclass(frozen=True)
class Workload:
    """One request. branches: 2 with guidance, 1 without. prepare_flops (both branches' text context), llm_flops (all
    prompts) and encode_flops (image) are once per request; chunk_flops and chunk_bytes are the VAE decoder's work and
    tensors alive in it at most for one of `chunks`, image_bytes those of its encoder, in bf16."""

    tokens: int
    text_tokens: int
    steps: int
    chunks: int
    prepare_flops: float
    llm_flops: float
    encode_flops: float
    chunk_flops: float
    chunk_bytes: int
    image_bytes: int
    branches: int = 2


def own_branches(layout: Layout, branches: int) -> int:
    """Guidance branches that one rank computes."""
    return max(1, branches // layout.cfg)
