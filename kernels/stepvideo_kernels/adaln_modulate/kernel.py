"""One pass over the residual stream in the Triton language.

A program keeps the six vectors of width D that every row needs, folded into three, in registers and walks over
ROWS_PER_PROGRAM rows of one batch entry: read again for each row they would cost more than the row itself. A row is
held whole in registers, so that the variance is taken about the mean in a second sweep that reads no memory, and the
next row is loaded while this one is reduced.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from stepvideo_kernels.adaln_modulate import spec
from stepvideo_kernels.kernel_spec import TileConfig

if TYPE_CHECKING:  # the compiler's environment has no torch
    from torch import Tensor

FP8_LIMIT = tl.constexpr(448.0)


@triton.jit
def adaln_modulate_kernel(
    x_ptr, branch_ptr, gate_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, out_scale_ptr, total_ptr, y_ptr,
    tokens, eps,
    HAS_RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x [B, N, D] -> y [B, N, D], and x' [B, N, D] where there is a residual.

    Grid: (ceil(N / ROWS_PER_PROGRAM), B). BLOCK_D is WIDTH rounded up to a power of two. Pointers that a variant does
    not use (branch, gate and total; out_scale) may be anything.
    """
    first_row = tl.program_id(0) * ROWS_PER_PROGRAM
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < WIDTH
    vector = batch * WIDTH + columns
    amplify = 1.0 + tl.load(scale_ptr + vector, mask=inside, other=0.0).to(tl.float32)
    factor = amplify * tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    offset = amplify * tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    offset += tl.load(shift_ptr + vector, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        gate = tl.load(gate_ptr + vector, mask=inside, other=0.0).to(tl.float32)
    if y_ptr.dtype.element_ty == tl.float8e4nv:
        unit = 1.0 / tl.load(out_scale_ptr)
        factor *= unit
        offset *= unit
    for row in tl.range(first_row, tl.minimum(first_row + ROWS_PER_PROGRAM, tokens), num_stages=STAGES):
        place = (batch * tokens + row) * WIDTH + columns
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += gate * tl.load(branch_ptr + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(total_ptr + place, x.to(total_ptr.dtype.element_ty), mask=inside)
        centred = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
        y = centred * inverse * factor + offset
        if y_ptr.dtype.element_ty == tl.float8e4nv:
            y = tl.clamp(y, -FP8_LIMIT, FP8_LIMIT)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(
    x: "Tensor",
    residual: "tuple[Tensor, Tensor] | None",
    affine: "tuple[Tensor, Tensor]",
    modulation: "tuple[Tensor, Tensor]",
    out_scale: "Tensor | None",
    outputs: "tuple[Tensor | None, Tensor]",
    eps: float,
    tile: TileConfig,
) -> None:
    """Writes x' (with `residual`, which is branch and gate) and y into `outputs`; with `out_scale`, y is FP8.

    `affine` is weight and bias, `modulation` scale and shift. Compiles at the first call on a GPU, or runs in the
    interpreter: production uses the binaries instead.
    """
    batch, tokens, width = x.shape
    total, y = outputs
    branch, gate = residual or (x, x)
    adaln_modulate_kernel[spec.grid(batch, tokens, tile)](
        x, branch, gate, *affine, *modulation, x if out_scale is None else out_scale, x if total is None else total, y,
        tokens, eps,
        HAS_RESIDUAL=residual is not None, WIDTH=width, BLOCK_D=spec.block_width(width), STAGES=tile.num_stages,
        ROWS_PER_PROGRAM=tile.block_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
