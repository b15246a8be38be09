"""The formula in torch operations; also what the op does on a CPU.

Axes: B batch, N tokens, D width.

    x'  = x + gate * branch                                      (the residual form only)
    y   = layer_norm(x') * (1 + scale) + shift
    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias,   over D, var without Bessel's correction
    FP8 : stored = clamp(y / out_scale, -448, 448) in E4M3, so y = stored * out_scale

All of it in fp32, rounded once; y is made from x' before x' is rounded.
Sources: LayerNorm arXiv 1607.06450; adaLN arXiv 2212.09748.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from stepvideo_kernels.kernel_spec import FP8_MAX


def adaln_modulate(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *, eps: float) -> Tensor:
    """x [B, N, D], weight and bias [D], scale and shift [B, D] -> y [B, N, D], all of x's type."""
    return _modulated(_wide(x), weight, bias, scale, shift, eps).to(x.dtype)


def adaln_modulate_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, out_scale: Tensor, *, eps: float
) -> Tensor:
    """The same with out_scale [1] fp32 -> y in E4M3."""
    return to_fp8(_modulated(_wide(x), weight, bias, scale, shift, eps), out_scale)


def adaln_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x and branch [B, N, D], gate [B, D] (ones where the residual has no gate), the rest as above -> x', y."""
    total = _gated(x, branch, gate)
    return total.to(x.dtype), _modulated(total, weight, bias, scale, shift, eps).to(x.dtype)


def adaln_residual_fp8(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    out_scale: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The same with out_scale [1] fp32 -> x' in x's type, y in E4M3."""
    total = _gated(x, branch, gate)
    return total.to(x.dtype), to_fp8(_modulated(total, weight, bias, scale, shift, eps), out_scale)


def to_fp8(y: Tensor, out_scale: Tensor) -> Tensor:
    """y divided by the one scale, clamped, rounded to nearest even."""
    return (y.float() / out_scale.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    wide = _wide(x)
    return wide + gate[:, None].to(wide.dtype) * branch.to(wide.dtype)


def _modulated(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    return normed * (1 + scale[:, None].to(x.dtype)) + shift[:, None].to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """At least fp32: fp64 stays, so that the formula can also be computed exactly."""
    return x if x.dtype == torch.float64 else x.float()
