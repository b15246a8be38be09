"""One pass over the qkv projection in the Triton language.

A program owns BLOCK_M tokens of one batch entry and walks over HEADS_PER_PROGRAM heads, so that the RoPE tables are
read once for all of them. The two members of a RoPE pair are loaded as separate [BLOCK_M, 64] tiles (`low` and `high`,
16 or 32 channels apart), which makes the rotation plain arithmetic: nothing is exchanged between threads, and only
the first half of each table part is read, since the second repeats it. Each run of 16 channels is one 32-byte sector.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from stepvideo_kernels.kernel_spec import TileConfig
from stepvideo_kernels.qkv_norm_rope import spec

if TYPE_CHECKING:  # the compiler's environment has no torch
    from torch import Tensor

HALF = tl.constexpr(64)
HEAD = tl.constexpr(128)
FP8_LIMIT = tl.constexpr(448.0)


@triton.jit
def pair_channels():
    """[64]: the channel of the first member of each pair: 0..31, 64..79, 96..111."""
    index = tl.arange(0, HALF)
    low = tl.where(index < 32, index, tl.where(index < 48, index + 32, index + 48))
    return tl.max_contiguous(tl.multiple_of(low, 16), 16)


@triton.jit
def pair_partners():
    """[64]: the channel of the second member: 32..63, 80..95, 112..127."""
    index = tl.arange(0, HALF)
    high = tl.where(index < 32, index + 32, tl.where(index < 48, index + 48, index + 64))
    return tl.max_contiguous(tl.multiple_of(high, 16), 16)


@triton.jit
def rounded(x, out_ptr):
    """x in the output's element type; FP8 is clamped, because E4M3 has no infinity."""
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        return tl.clamp(x, -FP8_LIMIT, FP8_LIMIT).to(tl.float8e4nv)
    return x.to(out_ptr.dtype.element_ty)


@triton.jit
def norm_rope(source, target, out_ptr, mask, low, high, gain_ptr, cos, sin, unit, eps):
    """RMS norm and rotation of one head's [BLOCK_M, 128] from `source` to `target` (rows of pointers), times unit."""
    first = tl.load(source + low[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + high[None, :], mask=mask, other=0.0).to(tl.float32)
    mean_square = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / HEAD
    inverse = (tl.rsqrt(mean_square + eps) * unit)[:, None]
    first = first * inverse * tl.load(gain_ptr + low).to(tl.float32)[None, :]
    second = second * inverse * tl.load(gain_ptr + high).to(tl.float32)[None, :]
    tl.store(target + low[None, :], rounded(first * cos - second * sin, out_ptr), mask=mask)
    tl.store(target + high[None, :], rounded(second * cos + first * sin, out_ptr), mask=mask)


@triton.jit
def qkv_norm_rope_kernel(
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, q_ptr, k_ptr, v_ptr,
    tokens, heads, padded, eps,
    TRANSPOSE_V: tl.constexpr, BLOCK_M: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """qkv [B, N, 384 H] -> q, k [B, H, N, 128] and v, alike or transposed [B, H, 128, padded].

    Grid: (ceil(padded or N / BLOCK_M), ceil(H / HEADS_PER_PROGRAM), B). The scales are read for FP8 outputs only.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_head = tl.program_id(1) * HEADS_PER_PROGRAM
    batch = tl.program_id(2).to(tl.int64)
    mask = (rows < tokens)[:, None]
    low, high = pair_channels(), pair_partners()
    table = rows[:, None] * HEAD + low[None, :]
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
    channels = tl.arange(0, HEAD)
    source = qkv_ptr + (batch * tokens + rows[:, None]) * (heads * 3 * HEAD)
    unit_q, unit_k, unit_v = 1.0, 1.0, 1.0
    for head in tl.range(first_head, tl.minimum(first_head + HEADS_PER_PROGRAM, heads), num_stages=STAGES):
        if q_ptr.dtype.element_ty == tl.float8e4nv:
            unit_q = 1.0 / tl.load(q_scale_ptr + head)
            unit_k = 1.0 / tl.load(k_scale_ptr + head)
            unit_v = 1.0 / tl.load(v_scale_ptr + head)
        mine = source + head * (3 * HEAD)
        plane = batch * heads + head
        target = (plane * tokens + rows[:, None]) * HEAD
        norm_rope(mine, q_ptr + target, q_ptr, mask, low, high, q_gain_ptr, cos, sin, unit_q, eps)
        norm_rope(mine + HEAD, k_ptr + target, k_ptr, mask, low, high, k_gain_ptr, cos, sin, unit_k, eps)
        v = tl.load(mine + 2 * HEAD + channels[None, :], mask=mask, other=0.0)
        if TRANSPOSE_V:
            turned = tl.trans(rounded(v.to(tl.float32) * unit_v, v_ptr))
            columns = (plane * HEAD + channels[:, None]) * padded + rows[None, :]
            tl.store(v_ptr + columns, turned, mask=(rows < padded)[None, :])
        else:
            tl.store(v_ptr + target + channels[None, :], v, mask=mask)


def launch(
    qkv: "Tensor",
    gains: "tuple[Tensor, Tensor]",
    tables: "tuple[Tensor, Tensor]",
    scales: "tuple[Tensor, Tensor, Tensor] | None",
    outputs: "tuple[Tensor, Tensor, Tensor]",
    eps: float,
    tile: TileConfig,
) -> None:
    """Writes q, k and v into `outputs`; with `scales`, each [H], they are FP8, and v is transposed.

    Compiles at the first call on a GPU, or runs in the interpreter: production uses the binaries instead.
    """
    batch, tokens, width = qkv.shape
    heads = width // (3 * spec.HEAD_DIM)
    qkv_norm_rope_kernel[spec.grid(batch, tokens, heads, tile, transposed=scales is not None)](
        qkv, *gains, *tables, *(scales or (qkv, qkv, qkv)), *outputs,
        tokens, heads, outputs[2].shape[-1], eps,
        TRANSPOSE_V=scales is not None, BLOCK_M=tile.block_m, STAGES=tile.num_stages,
        HEADS_PER_PROGRAM=tile.extra["HEADS_PER_PROGRAM"],
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
