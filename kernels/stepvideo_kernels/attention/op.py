"""`stepvideo::attention` and `attention_fp8`, as torch operators and ONNX nodes."""

import torch
from torch import Tensor

from stepvideo_kernels.attention import reference


@torch.library.custom_op("stepvideo::attention", mutates_args=(), device_types="cpu")
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, N, 128], k and v [B, H, L, 128] -> [B, N, 128 H]; the formula is in reference.py."""
    return reference.attention(q, k, v)


@torch.library.custom_op("stepvideo::attention_fp8", mutates_args=(), device_types="cpu")
def attention_fp8(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor) -> Tensor:
    """E4M3 q [B, H, N, 128], k [B, H, L, 128], v [B, H, 128, L rounded up to 16], scales [H] -> [B, N, 128 H] bf16."""
    return reference.attention_fp8(q, k, v, q_scale, k_scale, v_scale)


@attention.register_fake
def _shape(q: Tensor, *rest: object) -> Tensor:
    del rest
    return _output(q, q.dtype)


@attention_fp8.register_fake
def _shape_fp8(q: Tensor, *rest: object) -> Tensor:
    del rest
    return _output(q, torch.bfloat16)


def _output(q: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty [B, N, 128 H] for q [B, H, N, 128]."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3], dtype=dtype)
