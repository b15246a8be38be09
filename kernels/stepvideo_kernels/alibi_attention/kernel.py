"""Causal flash attention with sqrt-ALiBi and groups in the Triton language.

A program owns BLOCK_M queries of one head. q, k and v are read where the projection left them, so that nothing is split
or copied; the bias is computed from the positions, so that no [H, L, L] tensor exists. The six heads of a group run
side by side and share their keys and values through L2.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from stepvideo_kernels.alibi_attention import spec
from stepvideo_kernels.kernel_spec import TileConfig
from stepvideo_kernels.online_softmax import dot, softmax_step

if TYPE_CHECKING:  # the compiler's environment has no torch
    from torch import Tensor

HEAD = tl.constexpr(128)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def alibi_attention_kernel(
    qkv, slopes, out, tokens, heads, groups, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """qkv [B, L, 128 (H + 2 G)], slopes [H] fp32 -> out [B, L, 128 H]. Grid: (ceil(L / BLOCK_M), H, B).

    scale = 1 / sqrt(128). Scores are in units of log2(e), so that 2^x is the exponential.
    """
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    first = tl.program_id(2).to(tl.int64) * tokens
    width = (heads + 2 * groups) * HEAD
    channels = tl.arange(0, HEAD)
    rows = start_m + tl.arange(0, BLOCK_M)
    base = qkv + first * width
    q_tile = tl.load(
        base + rows[:, None] * width + head * HEAD + channels[None, :], mask=rows[:, None] < tokens, other=0.0
    )
    pair = base + (heads + 2 * (head // (heads // groups))) * HEAD
    slope = tl.load(slopes + head) * LOG2_E
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD], tl.float32)
    for start_n in tl.range(0, tl.minimum(start_m + BLOCK_M, tokens), BLOCK_N):
        columns = start_n + tl.arange(0, BLOCK_N)
        pointers = pair + columns[:, None] * width + channels[None, :]
        k_tile = tl.load(pointers, mask=columns[:, None] < tokens, other=0.0)
        scores = dot(q_tile, k_tile.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), INTERPRET)
        distance = rows[:, None] - columns[None, :]
        bias = slope * tl.sqrt(tl.maximum(distance, 0).to(tl.float32))
        scores = tl.where(distance >= 0, scores * (scale * LOG2_E) - bias, float("-inf"))
        weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, 1.0, 0)
        v_tile = tl.load(pointers + HEAD, mask=columns[:, None] < tokens, other=0.0)
        acc = dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], INTERPRET)
    result = (acc / row_sum[:, None]).to(q_tile.dtype)
    offsets = (first + rows[:, None]) * heads * HEAD + head * HEAD + channels[None, :]
    tl.store(out + offsets, result, mask=rows[:, None] < tokens)


def launch(qkv: "Tensor", slopes: "Tensor", out: "Tensor", tile: TileConfig) -> None:
    """Writes the attention of `qkv` into `out`.

    Compiles at the first call on a GPU, or runs in the interpreter: production uses the binaries instead.
    """
    batch, tokens, width = qkv.shape
    heads = slopes.shape[0]
    alibi_attention_kernel[spec.grid(batch, tokens, heads, tile)](
        qkv, slopes, out, tokens, heads, spec.groups(width, heads), spec.SCALE,
        **{**spec.constexprs(tile), "INTERPRET": not qkv.is_cuda},
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
