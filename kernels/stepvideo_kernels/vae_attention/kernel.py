"""Causal flash attention with a very wide head in the Triton language.

An accumulator of 128 queries by 512 channels does not fit into registers. So the value channels are divided between
programs, VALUES each, and each of these computes all scores for itself: half as much work again, but no memory beyond
the output. Scores are summed up over the channels CHUNK at a time, which also admits any multiple of 32 channels.
Programs with many keys start first, so that none is left over at the end.

TMA       q, k, v and out come as tensor maps (SM 90 and newer); otherwise they are pointers
STREAM_Q  the chunks of q are loaded again for each tile of keys, where shared memory does not hold them all
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from stepvideo_kernels.kernel_spec import TileConfig
from stepvideo_kernels.online_softmax import dot, softmax_step
from stepvideo_kernels.vae_attention import spec

if TYPE_CHECKING:  # the compiler's environment has no torch
    from torch import Tensor


@triton.jit
def load_tile(
    tensor, batch, tokens, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of [B, tokens, WIDTH], zeros outside it."""
    if TMA:
        tile = tensor.load([batch, row, column]).reshape(ROWS, COLUMNS)
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        mask = rows[:, None] < tokens
        if WIDTH % COLUMNS != 0:
            mask = mask & (columns[None, :] < WIDTH)
        base = tensor + batch.to(tl.int64) * tokens * WIDTH
        tile = tl.load(base + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def vae_attention_kernel(
    q, k, v, out, tokens, to_log2,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, VALUES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, STREAM_Q: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """q, k, v [B, N, WIDTH] -> out alike. Grid: (ceil(N / BLOCK_M), ceil(WIDTH / VALUES), B).

    to_log2 = log2(e) / sqrt(WIDTH).
    """
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    column = tl.program_id(1) * VALUES
    batch = tl.program_id(2)
    rows = start_m + tl.arange(0, BLOCK_M)
    q_chunks = tl.tuple(())
    if not STREAM_Q:
        for channel in tl.static_range(0, WIDTH, CHUNK):
            q_chunks += (load_tile(q, batch, tokens, start_m, channel, BLOCK_M, CHUNK, WIDTH, TMA),)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUES], tl.float32)
    for start_n in tl.range(0, tl.minimum(start_m + BLOCK_M, tokens), BLOCK_N):
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if STREAM_Q:
            for channel in tl.range(0, WIDTH, CHUNK):
                q_tile = load_tile(q, batch, tokens, start_m, channel, BLOCK_M, CHUNK, WIDTH, TMA)
                k_tile = load_tile(k, batch, tokens, start_n, channel, BLOCK_N, CHUNK, WIDTH, TMA)
                scores = dot(q_tile, k_tile.T, scores, INTERPRET)
        else:
            for index in tl.static_range(0, WIDTH // CHUNK):
                k_tile = load_tile(k, batch, tokens, start_n, index * CHUNK, BLOCK_N, CHUNK, WIDTH, TMA)
                scores = dot(q_chunks[index], k_tile.T, scores, INTERPRET)
        if start_n + BLOCK_N > start_m:
            columns = start_n + tl.arange(0, BLOCK_N)
            scores = tl.where(columns[None, :] <= rows[:, None], scores, float("-inf"))
        weights, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, to_log2, 0)
        v_tile = load_tile(v, batch, tokens, start_n, column, BLOCK_N, VALUES, WIDTH, TMA)
        acc = dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], INTERPRET)
    result = (acc * (1.0 / row_sum)[:, None]).to(v.dtype if TMA else v.dtype.element_ty)
    if TMA:
        out.store([batch, start_m, column], result.reshape(1, BLOCK_M, VALUES))
    else:
        channels = column + tl.arange(0, VALUES)
        offsets = (batch.to(tl.int64) * tokens + rows[:, None]) * WIDTH + channels[None, :]
        tl.store(out + offsets, result, mask=(rows[:, None] < tokens) & (channels[None, :] < WIDTH))


def launch(q: "Tensor", k: "Tensor", v: "Tensor", out: "Tensor", tile: TileConfig) -> None:
    """Writes the attention of q to k and v into `out`.

    Compiles at the first call on a GPU, or runs in the interpreter: production uses the binaries instead.
    """
    batch, tokens, width = q.shape
    operands: list[Tensor | TensorDescriptor] = [q, k, v, out]
    if tile.extra["TMA"]:
        blocks = [list(box) for box in spec.boxes(tile, width)]
        operands = [TensorDescriptor.from_tensor(*pair) for pair in zip((q, k, v, out), blocks, strict=True)]
    vae_attention_kernel[spec.grid(batch, tokens, width, tile)](
        *operands, tokens, spec.to_log2(width),
        **{**spec.constexprs(tile, width), "INTERPRET": not q.is_cuda},
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
