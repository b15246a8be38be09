"""A DiT block cut where ranks must exchange, and what each piece takes and gives.

    tensor parallel     attn ─Σ─ text ─Σ─ ff ─Σ─            Σ = sum over the ranks' partial results
    sequence parallel   qkv ─⇄─ core ─⇄─ out ─Σ─ text ...   ⇄ = all-to-all between tokens and heads

A rank holds a slice of the heads and of the feed-forward's hidden channels; its pieces give *partial* results, gates
applied, which add up to the block's. The next piece adds the sum to the tokens.
Source: Megatron-LM (arXiv 1909.08053) for the cuts, DeepSpeed-Ulysses (arXiv 2309.14509) for the exchange.
Axes: B = 1, n this rank's tokens, N all tokens, D width, H this rank's heads, h heads after the exchange.
"""

import torch
from torch import Tensor, nn

from stepvideo_serve.dit.blocks import AttentionCore, DiTBlock
from stepvideo_serve.dit.config import HEAD_DIM, DiTConfig
from stepvideo_serve.dit.graphs import CONTEXT_TOKENS, VIDEO_TOKENS
from stepvideo_serve.engine.spec import EngineSpec, TensorSpec

CORE = "dit_core_"
PIECES = {False: ("attn", "text", "ff"), True: ("qkv", "out", "text", "ff")}
"""Per block; with sequence parallelism (True) all blocks also share the weightless attention core."""


class AttnSegment(nn.Module):
    """Self-attention of a slice of the heads over all tokens."""

    def __init__(self, block: DiTBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor, modulation: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        shift, scale, gate = modulations(self.block, modulation)[:3]
        x = self.block.norm1.modulated(tokens, scale, shift)
        return gate * self.block.attn1(x, rope_cos, rope_sin)


class QkvSegment(nn.Module):
    """Queries, keys and values of a slice of the heads for this rank's tokens."""

    def __init__(self, block: DiTBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor, modulation: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        shift, scale = modulations(self.block, modulation)[:2]
        x = self.block.norm1.modulated(tokens, scale, shift)
        return torch.cat(self.block.attn1.project(x, rope_cos, rope_sin))


class CoreSegment(nn.Module):
    """Attention of some heads over all tokens; no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.core = AttentionCore()

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.split(1)
        return self.core(q, k, v)


class OutSegment(nn.Module):
    """Output projection of a slice of the heads for this rank's tokens."""

    def __init__(self, block: DiTBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, attended: Tensor, modulation: Tensor) -> Tensor:
        return modulations(self.block, modulation)[2] * self.block.attn1.wo(attended)


class TextSegment(nn.Module):
    """Adds the sum, then cross-attention of a slice of the heads."""

    def __init__(self, block: DiTBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor, summed: Tensor, cross_k: Tensor, cross_v: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens + summed
        return tokens, self.block.attn2(tokens, cross_k, cross_v)


class FfSegment(nn.Module):
    """Adds the sum, then a slice of the feed-forward."""

    def __init__(self, block: DiTBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor, summed: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate = modulations(self.block, modulation)[3:]
        tokens, y = self.block.norm2.modulated_sum(tokens, summed, scale, shift)
        return tokens, gate * self.block.ff(y)


def modulations(block: DiTBlock, modulation: Tensor) -> tuple[Tensor, ...]:
    """shift, scale and gate of the attention, then of the feed-forward, each [B, 1, D]."""
    return (block.scale_shift_table + modulation).split(1, dim=1)


def segment_spec(config: DiTConfig, dtype: str, piece: str, index: int, tensor_parts: int) -> EngineSpec:
    """The spec of one piece ("attn", "qkv", "out", "text", "ff") of block `index` on one of `tensor_parts` ranks."""
    tokens, width, heads = (1, "tokens", config.width), config.width, config.num_heads // tensor_parts
    modulation = TensorSpec("modulation", dtype, (1, 6, width))
    inputs: dict[str, tuple[TensorSpec, ...]] = {
        "attn": (TensorSpec("tokens", dtype, tokens), modulation, *_rope()),
        "qkv": (TensorSpec("tokens", dtype, tokens), modulation, *_rope()),
        "out": (TensorSpec("attended", dtype, (1, "tokens", heads * HEAD_DIM)), modulation),
        "text": (TensorSpec("tokens", dtype, tokens), TensorSpec("summed", dtype, tokens), *_cross(dtype, heads)),
        "ff": (TensorSpec("tokens", dtype, tokens), TensorSpec("summed", dtype, tokens), modulation),
    }
    partial = TensorSpec("partial", dtype, tokens)
    outputs: dict[str, tuple[TensorSpec, ...]] = {
        "attn": (partial,),
        "qkv": (TensorSpec("qkv", dtype, (3, heads, "tokens", HEAD_DIM)),),
        "out": (partial,),
        "text": (TensorSpec("tokens_out", dtype, tokens), partial),
        "ff": (TensorSpec("tokens_out", dtype, tokens), partial),
    }
    dims = {"tokens": VIDEO_TOKENS, **({"context_tokens": CONTEXT_TOKENS} if piece == "text" else {})}
    return EngineSpec(f"dit_{piece}_{index:02d}", inputs[piece], outputs[piece], dims)


def core_spec(dtype: str, heads: int) -> EngineSpec:
    """Attention of `heads` heads over all tokens."""
    return EngineSpec(
        core_name(heads),
        inputs=(TensorSpec("qkv", dtype, (3, heads, "tokens", HEAD_DIM)),),
        outputs=(TensorSpec("attended", dtype, (1, "tokens", heads * HEAD_DIM)),),
        dims={"tokens": VIDEO_TOKENS},
    )


def core_name(heads: int) -> str:
    """ "dit_core_2h": one graph per number of heads, shared by all blocks and ranks."""
    return f"{CORE}{heads}h"


def core_heads(name: str) -> int:
    """The heads of the graph with that name."""
    return int(name.removeprefix(CORE).removesuffix("h"))


def segment_module(piece: str, block: DiTBlock) -> nn.Module:
    """The module of one piece."""
    kinds = {"attn": AttnSegment, "qkv": QkvSegment, "out": OutSegment, "text": TextSegment, "ff": FfSegment}
    return kinds[piece](block)


def _rope() -> tuple[TensorSpec, TensorSpec]:
    shape = ("tokens", HEAD_DIM)
    return TensorSpec("rope_cos", "float32", shape), TensorSpec("rope_sin", "float32", shape)


def _cross(dtype: str, heads: int) -> tuple[TensorSpec, TensorSpec]:
    shape = (1, heads, "context_tokens", HEAD_DIM)
    return TensorSpec("cross_k", dtype, shape), TensorSpec("cross_v", dtype, shape)
