"""Bytes that one rank of a layout holds on its GPU, by what they are for. Pure arithmetic.

Weights are exact. Activations and scratch are predicted: tensors alive at the same time in the pieces of a block; a
TensorRT engine may plan better, an eager run fragments. Letters: D width, n tokens of this rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from stepvideo_serve.memory.sizes import BF16_BYTES, FP32_BYTES, GIB, ModelSize, Workload, own_branches
from stepvideo_serve.parallel.layout import Layout, split_evenly

RESERVED_BYTES = 4 * GIB
"""Per GPU for the CUDA context, NCCL's buffers, the machine code of some 290 engines, the tensors between graphs, and
what the allocator cannot use. An estimate: no GPU has been asked."""


@dataclass(frozen=True)
class Memory:
    """Bytes on rank 0's GPU. block_scratch lives inside a piece of a block, chunk_scratch inside the VAE decoder; they
    are never needed at the same time. llm: for each placement that the layout allows."""

    dit: int
    clip: int
    vae: int
    cross_kv: int
    activations: int
    block_scratch: int
    chunk_scratch: int
    reserved: int
    llm: Mapping[str, int]

    def total(self, placement: str) -> int:
        weights = self.dit + self.clip + self.vae + self.llm[placement]
        denoising = self.cross_kv + self.activations + self.block_scratch
        return weights + max(denoising, self.chunk_scratch) + self.reserved


def memory(size: ModelSize, layout: Layout, work: Workload, precision: str) -> Memory:
    """See Memory and the module's docstring."""
    tp, branches = layout.tp, own_branches(layout, work.branches)
    own = split_evenly(work.tokens, layout.sp)[0]
    tokens_bytes = own * size.width * BF16_BYTES
    rope_bytes = 2 * own * size.head_dim * FP32_BYTES
    llm = {"split": size.llm.bytes(tp, precision)} if tp > 1 and size.llm_groups % tp == 0 else {}
    return Memory(
        dit=size.dit.bytes(tp, precision),
        clip=size.clip_parameters * BF16_BYTES,
        vae=size.vae_parameters * BF16_BYTES,
        cross_kv=2 * size.layers * branches * work.text_tokens * size.width // tp * BF16_BYTES,
        activations=living_tokens(layout, branches) * tokens_bytes + rope_bytes,
        block_scratch=block_scratch(size, layout, own),
        chunk_scratch=work.chunk_bytes,
        reserved=RESERVED_BYTES,
        llm={**llm, "whole": size.llm.bytes(1, precision), "elsewhere": 0},
    )


def living_tokens(layout: Layout, branches: int) -> int:
    """How many [n, D] live between the pieces: a step's first tokens, the running branch's tokens before and after,
    its sum and its new partial result, and per waiting branch tokens and sum. Whole blocks have no sums."""
    return 3 if layout.tp == layout.sp == 1 else 5 + 2 * (branches - 1)


def block_scratch(size: ModelSize, layout: Layout, own_tokens: int) -> int:
    """Largest memory inside a piece of a block, in bytes.

    Self-attention holds the modulated tokens, q, k and v, fp32 copies of q and k for the norm and the rotation, and the
    result; the feed-forward the modulated tokens and its hidden values before and after GELU; the exchange of heads
    four copies of q, k and v. (TensorRT planned 4.5 GB for one whole block at 38,400 tokens; this says 4.2.)
    """
    heads = size.width / layout.tp
    attention = size.width + (3 + 4 + 1) * heads
    feed_forward = size.width + 2 * size.hidden / layout.tp
    exchange = 4 * 3 * heads if layout.sp > 1 else 0
    return ceil(own_tokens * max(attention, feed_forward, exchange) * BF16_BYTES)
