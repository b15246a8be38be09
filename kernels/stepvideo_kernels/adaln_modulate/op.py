"""`stepvideo::adaln_modulate`, `stepvideo::adaln_residual` and their FP8 forms, as torch operators and ONNX nodes."""

import torch
from torch import Tensor

from stepvideo_kernels.adaln_modulate import reference

EPS = 1e-5


@torch.library.custom_op("stepvideo::adaln_modulate", mutates_args=(), device_types="cpu")
def adaln_modulate(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> Tensor:
    """x [B, N, D], weight and bias [D], scale and shift [B, D] -> y [B, N, D]; the formula is in reference.py."""
    return reference.adaln_modulate(x, weight, bias, scale, shift, eps=eps)


@torch.library.custom_op("stepvideo::adaln_modulate_fp8", mutates_args=(), device_types="cpu")
def adaln_modulate_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, out_scale: Tensor, eps: float = EPS
) -> Tensor:
    """The same with out_scale [1] fp32 -> y in E4M3."""
    return reference.adaln_modulate_fp8(x, weight, bias, scale, shift, out_scale, eps=eps)


@torch.library.custom_op("stepvideo::adaln_residual", mutates_args=(), device_types="cpu")
def adaln_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """x and branch [B, N, D], gate [B, D], the rest as above -> x + gate * branch, and y of that sum."""
    return reference.adaln_residual(x, branch, gate, weight, bias, scale, shift, eps=eps)


@torch.library.custom_op("stepvideo::adaln_residual_fp8", mutates_args=(), device_types="cpu")
def adaln_residual_fp8(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    out_scale: Tensor,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """The same with out_scale [1] fp32 -> the sum in x's type, y in E4M3."""
    return reference.adaln_residual_fp8(x, branch, gate, weight, bias, scale, shift, out_scale, eps=eps)


@adaln_modulate.register_fake
def _plain_shape(x: Tensor, *rest: object) -> Tensor:
    del rest
    return torch.empty_like(x)


@adaln_modulate_fp8.register_fake
def _plain_fp8_shape(x: Tensor, *rest: object) -> Tensor:
    del rest
    return torch.empty_like(x, dtype=torch.float8_e4m3fn)


@adaln_residual.register_fake
def _residual_shape(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    del rest
    return torch.empty_like(x), torch.empty_like(x)


@adaln_residual_fp8.register_fake
def _residual_fp8_shape(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    del rest
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.float8_e4m3fn)
