"""The DiT cut into graphs, and what each takes and gives.

    once per request   dit_context        text states -> text context
                       dit_cross_NN       text context -> keys and values of block NN's cross-attention
    once per step      dit_embed          latent, condition, time, motion -> tokens, modulation
                       dit_block_NN       tokens -> tokens, once per block and guidance branch
                       dit_final          tokens -> velocity

A graph per block keeps building in constant memory, and rebuilds only what changed. Each graph has batch 1: the two
guidance branches run one after the other, each with its own text length, so no attention needs a mask.
"""

from torch import Tensor, nn

from stepvideo_serve.dit.blocks import DiTBlock
from stepvideo_serve.dit.config import HEAD_DIM, DiTConfig
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS

VIDEO_TOKENS = Dim(min=3, opt=37944, max=131072)
LLM_TOKENS = Dim(min=2, opt=128, max=LLM_MAX_TOKENS)
CONTEXT_TOKENS = Dim(min=CLIP_TOKENS + 2, opt=CLIP_TOKENS + 128, max=CLIP_TOKENS + LLM_MAX_TOKENS)


class ContextGraph(nn.Module):
    """Projects both text states to the DiT's width; the caller joins them, CLIP first."""

    def __init__(self, outer: StepVideoDiT) -> None:
        super().__init__()
        self.outer = outer

    def forward(self, llm_states: Tensor, clip_states: Tensor) -> tuple[Tensor, Tensor]:
        context = self.outer.context(llm_states, clip_states)
        return context[:, :CLIP_TOKENS], context[:, CLIP_TOKENS:]


class EmbedGraph(nn.Module):
    """The start of a step; its result serves both guidance branches."""

    def __init__(self, outer: StepVideoDiT) -> None:
        super().__init__()
        self.outer = outer

    def forward(
        self, latent_tokens: Tensor, condition_tokens: Tensor, timestep: Tensor, motion_score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.outer.embed(latent_tokens, condition_tokens, timestep, motion_score)


class CrossGraph(nn.Module):
    """Keys and values of one block's cross-attention."""

    def __init__(self, block: DiTBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.block.attn2.keys_values(context)


class FinalGraph(nn.Module):
    """The end of a step."""

    def __init__(self, outer: StepVideoDiT) -> None:
        super().__init__()
        self.outer = outer

    def forward(self, tokens: Tensor, time_embedding: Tensor) -> Tensor:
        return self.outer.final(tokens, time_embedding)


def context_spec(config: DiTConfig, dtype: str) -> EngineSpec:
    return EngineSpec(
        "dit_context",
        inputs=(
            TensorSpec("llm_states", dtype, (1, "llm_tokens", config.llm_channels)),
            TensorSpec("clip_states", dtype, (1, CLIP_TOKENS, config.clip_channels)),
        ),
        outputs=(
            TensorSpec("clip_context", dtype, (1, CLIP_TOKENS, config.width)),
            TensorSpec("llm_context", dtype, (1, "llm_tokens", config.width)),
        ),
        dims={"llm_tokens": LLM_TOKENS},
    )


def cross_spec(config: DiTConfig, dtype: str, index: int, tensor_parts: int = 1) -> EngineSpec:
    """On one of `tensor_parts` ranks: keys and values of that rank's heads."""
    heads = (1, config.num_heads // tensor_parts, "context_tokens", HEAD_DIM)
    return EngineSpec(
        f"dit_cross_{index:02d}",
        inputs=(TensorSpec("context", dtype, (1, "context_tokens", config.width)),),
        outputs=(TensorSpec("cross_k", dtype, heads), TensorSpec("cross_v", dtype, heads)),
        dims={"context_tokens": CONTEXT_TOKENS},
    )


def embed_spec(config: DiTConfig, dtype: str) -> EngineSpec:
    patches = (1, "tokens", config.patch_values)
    return EngineSpec(
        "dit_embed",
        inputs=(
            TensorSpec("latent_tokens", dtype, patches),
            TensorSpec("condition_tokens", dtype, patches),
            TensorSpec("timestep", "float32", (1,)),
            TensorSpec("motion_score", "float32", (1,)),
        ),
        outputs=(
            TensorSpec("tokens", dtype, (1, "tokens", config.width)),
            TensorSpec("modulation", dtype, (1, 6, config.width)),
            TensorSpec("time_embedding", dtype, (1, config.width)),
        ),
        dims={"tokens": VIDEO_TOKENS},
    )


def block_spec(config: DiTConfig, dtype: str, index: int) -> EngineSpec:
    heads = (1, config.num_heads, "context_tokens", HEAD_DIM)
    return EngineSpec(
        f"dit_block_{index:02d}",
        inputs=(
            TensorSpec("tokens", dtype, (1, "tokens", config.width)),
            TensorSpec("modulation", dtype, (1, 6, config.width)),
            TensorSpec("rope_cos", "float32", ("tokens", HEAD_DIM)),
            TensorSpec("rope_sin", "float32", ("tokens", HEAD_DIM)),
            TensorSpec("cross_k", dtype, heads),
            TensorSpec("cross_v", dtype, heads),
        ),
        outputs=(TensorSpec("tokens_out", dtype, (1, "tokens", config.width)),),
        dims={"tokens": VIDEO_TOKENS, "context_tokens": CONTEXT_TOKENS},
    )


def final_spec(config: DiTConfig, dtype: str) -> EngineSpec:
    return EngineSpec(
        "dit_final",
        inputs=(
            TensorSpec("tokens", dtype, (1, "tokens", config.width)),
            TensorSpec("time_embedding", dtype, (1, config.width)),
        ),
        outputs=(TensorSpec("velocity", dtype, (1, "tokens", config.patch_size**2 * config.out_channels)),),
        dims={"tokens": VIDEO_TOKENS},
    )
