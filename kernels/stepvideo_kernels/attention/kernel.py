"""Flash attention forward in the Triton language (arXiv 2205.14135; arXiv 2407.08608 for Hopper).

A program owns BLOCK_M queries of one head and walks over all keys, BLOCK_N at a time. Programs of one head run side by
side, so that its keys and values are read from device memory once and from L2 afterwards.

TMA            q, k, v and out come as tensor maps, so that one thread starts the copy of a whole tile into shared
               memory (SM 90 and newer); otherwise they are pointers
WARP_SPECIALIZE  copies get a warp of their own, and so does tensor-core work on Blackwell; every tile is masked, since
               the compiler takes one loop only
FRESH          each tile's P v is summed in an accumulator of its own (FP8: see online_softmax.fresh_dot)
AHEAD          the scores of the next tile are multiplied while the softmax of this one is computed (arXiv 2407.08608,
               section 3.2)
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from stepvideo_kernels.attention import spec
from stepvideo_kernels.kernel_spec import TileConfig
from stepvideo_kernels.online_softmax import dot, fresh_dot, softmax_step

if TYPE_CHECKING:  # the compiler's environment has no torch
    from torch import Tensor

HEAD = tl.constexpr(128)
SHIFT = tl.constexpr(8)


@triton.jit
def load_rows(tensor, plane, size, start, BLOCK: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr):
    """[BLOCK, 128]: rows from `start` on of one [size, 128] plane; zeros from row `size` on."""
    if TMA:
        tile = tensor.load([plane, start, 0]).reshape(BLOCK, HEAD)
    else:
        rows = start + tl.arange(0, BLOCK)
        pointers = tensor + plane.to(tl.int64) * size * HEAD + rows[:, None] * HEAD + tl.arange(0, HEAD)[None, :]
        tile = tl.load(pointers, mask=rows[:, None] < size, other=0.0) if MASK else tl.load(pointers)
    return tile


@triton.jit
def load_columns(tensor, plane, padded, start, BLOCK: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr):
    """[BLOCK, 128]: columns from `start` on of one [128, padded] plane, turned; zeros from column `padded` on."""
    if TMA:
        tile = tensor.load([plane, 0, start]).reshape(HEAD, BLOCK)
    else:
        columns = start + tl.arange(0, BLOCK)
        rows = tl.arange(0, HEAD)[:, None] * padded
        pointers = tensor + plane.to(tl.int64) * HEAD * padded + rows + columns[None, :]
        tile = tl.load(pointers, mask=columns[None, :] < padded, other=0.0) if MASK else tl.load(pointers)
    return tile.T


@triton.jit
def multiply(q_tile, k, plane, keys, start, end, BLOCK_N: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Scores [M, BLOCK_N] fp32 of keys start .. start + BLOCK_N - 1; minus infinity from `end` on with MASK."""
    k_tile = load_rows(k, plane, keys, start, BLOCK_N, TMA, MASK)
    scores = dot(q_tile, k_tile.T, tl.zeros([q_tile.shape[0], BLOCK_N], tl.float32), INTERPRET)
    if MASK:
        inside = start + tl.arange(0, BLOCK_N) < end
        scores = tl.where(inside[None, :], scores, float("-inf"))
    return scores


@triton.jit
def absorb(
    scores, v, plane, keys, padded, start, to_log2, row_max, row_sum, acc,
    FP8: tl.constexpr, TMA: tl.constexpr, FRESH: tl.constexpr, MASK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Takes the values of one tile in, weighted by the softmax of its scores."""
    block: tl.constexpr = scores.shape[1]
    weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, to_log2, SHIFT if FP8 else 0)
    if FP8:
        v_tile = load_columns(v, plane, padded, start, block, TMA, MASK)
    else:
        v_tile = load_rows(v, plane, keys, start, block, TMA, MASK)
    if FRESH:
        acc = acc * rescale[:, None] + fresh_dot(weights.to(v_tile.dtype), v_tile, INTERPRET)
    else:
        acc = dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], INTERPRET)
    return row_max, row_sum, acc


@triton.jit
def attend_tiles(
    q_tile, k, v, plane, keys, padded, first, end, to_log2, row_max, row_sum, acc,
    FP8: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, FRESH: tl.constexpr, MASK: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys first .. end - 1; only with MASK may `end` lie inside a tile."""
    for start in tl.range(first, end, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        start = tl.multiple_of(start, BLOCK_N)
        scores = multiply(q_tile, k, plane, keys, start, end, BLOCK_N, TMA, MASK, INTERPRET)
        row_max, row_sum, acc = absorb(
            scores, v, plane, keys, padded, start, to_log2, row_max, row_sum, acc,
            FP8, TMA, FRESH, MASK, INTERPRET,
        )  # fmt: skip
    return row_max, row_sum, acc


@triton.jit
def attend_ahead(
    q_tile, k, v, plane, keys, padded, end, to_log2, row_max, row_sum, acc,
    FP8: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, FRESH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The same over keys 0 .. end - 1, one or more whole tiles: the tensor cores multiply the next tile's scores while
    the softmax of this tile's is computed."""
    scores = multiply(q_tile, k, plane, keys, 0, end, BLOCK_N, TMA, False, INTERPRET)
    for start in tl.range(0, end - BLOCK_N, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        next_scores = multiply(q_tile, k, plane, keys, start + BLOCK_N, end, BLOCK_N, TMA, False, INTERPRET)
        row_max, row_sum, acc = absorb(
            scores, v, plane, keys, padded, start, to_log2, row_max, row_sum, acc,
            FP8, TMA, FRESH, False, INTERPRET,
        )  # fmt: skip
        scores = next_scores
    return absorb(
        scores, v, plane, keys, padded, end - BLOCK_N, to_log2, row_max, row_sum, acc,
        FP8, TMA, FRESH, False, INTERPRET,
    )  # fmt: skip


@triton.jit
def attention_kernel(
    q, k, v, out, q_scale, k_scale, v_scale, heads, queries, keys, padded, to_log2,
    FP8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    FRESH: tl.constexpr, AHEAD: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """q [B, H, N, 128], k [B, H, L, 128], v alike or (FP8) [B, H, 128, padded] -> out [B, N, 128 H].

    Grid: (ceil(N / BLOCK_M), B * H). The scales [H] are read with FP8 only. to_log2 = log2(e) / sqrt(128).
    """
    start_m = tl.program_id(0) * BLOCK_M
    plane = tl.program_id(1)
    batch, head = plane // heads, plane % heads
    if FP8:
        to_log2 *= tl.load(q_scale + head) * tl.load(k_scale + head)
    q_tile = load_rows(q, plane, queries, start_m, BLOCK_M, TMA, True)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD], tl.float32)
    whole = 0
    if not WARP_SPECIALIZE:
        whole = keys // BLOCK_N * BLOCK_N
    if AHEAD:
        if whole > 0:
            row_max, row_sum, acc = attend_ahead(
                q_tile, k, v, plane, keys, padded, whole, to_log2, row_max, row_sum, acc,
                FP8, BLOCK_N, TMA, FRESH, INTERPRET,
            )  # fmt: skip
    elif not WARP_SPECIALIZE:
        row_max, row_sum, acc = attend_tiles(
            q_tile, k, v, plane, keys, padded, 0, whole, to_log2, row_max, row_sum, acc,
            FP8, BLOCK_N, TMA, FRESH, False, False, INTERPRET,
        )  # fmt: skip
    row_max, row_sum, acc = attend_tiles(
        q_tile, k, v, plane, keys, padded, whole, keys, to_log2, row_max, row_sum, acc,
        FP8, BLOCK_N, TMA, FRESH, True, WARP_SPECIALIZE, INTERPRET,
    )  # fmt: skip
    inverse = 1.0 / row_sum
    if FP8:
        inverse *= tl.load(v_scale + head)
    result = (acc * inverse[:, None]).to(tl.bfloat16 if FP8 else q_tile.dtype)
    if TMA:
        out.store([batch, start_m, head * HEAD], result.reshape(1, BLOCK_M, HEAD))
    else:
        rows = start_m + tl.arange(0, BLOCK_M)
        row_offsets = (batch.to(tl.int64) * queries + rows) * heads * HEAD
        offsets = row_offsets[:, None] + head * HEAD + tl.arange(0, HEAD)[None, :]
        tl.store(out + offsets, result, mask=rows[:, None] < queries)


def launch(
    q: "Tensor",
    k: "Tensor",
    v: "Tensor",
    out: "Tensor",
    tile: TileConfig,
    *,
    scales: "tuple[Tensor, Tensor, Tensor] | None" = None,
) -> None:
    """Writes the attention of q to k and v into `out`; with `scales` all three are FP8, and v is transposed.

    Compiles at the first call on a GPU, or runs in the interpreter: production uses the binaries instead.
    """
    batch, heads, queries, _ = q.shape
    keys, fp8 = k.shape[2], scales is not None
    constexprs = spec.constexprs(tile, fp8=fp8)
    operands: list[Tensor | TensorDescriptor] = [q, k, v, out]
    if tile.extra["TMA"]:
        shapes = spec.boxes(tile, fp8=fp8)
        planes = [q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), out]
        operands = [TensorDescriptor.from_tensor(*pair) for pair in zip(planes, map(list, shapes), strict=True)]
    attention_kernel[spec.grid(batch, heads, queries, tile)](
        *operands, *(scales or (q, q, q)),
        heads, queries, keys, v.shape[3] if fp8 else 0, spec.TO_LOG2,
        **{**constexprs, "INTERPRET": not q.is_cuda},
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
