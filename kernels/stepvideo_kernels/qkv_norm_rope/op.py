"""`stepvideo::qkv_norm_rope` and `stepvideo::qkv_norm_rope_fp8` as torch operators and as ONNX nodes."""

import torch
from torch import Tensor

from stepvideo_kernels.qkv_norm_rope import reference, spec

EPS = 1e-6


@torch.library.custom_op("stepvideo::qkv_norm_rope", mutates_args=(), device_types="cpu")
def qkv_norm_rope(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rope_cos: Tensor, rope_sin: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, N, 384 H], gains [128], tables [N, 128] fp32 -> q, k, v [B, H, N, 128]; formula in reference.py."""
    return reference.qkv_norm_rope(qkv, q_gain, k_gain, rope_cos, rope_sin, eps=eps)


@torch.library.custom_op("stepvideo::qkv_norm_rope_fp8", mutates_args=(), device_types="cpu")
def qkv_norm_rope_fp8(
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """As above with scales [H] fp32 -> E4M3 q, k [B, H, N, 128] and v [B, H, 128, N rounded up to 16]."""
    return reference.qkv_norm_rope_fp8(qkv, q_gain, k_gain, rope_cos, rope_sin, q_scale, k_scale, v_scale, eps=eps)


@qkv_norm_rope.register_fake
def _fake(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rope_cos: Tensor, rope_sin: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    del q_gain, k_gain, rope_cos, rope_sin, eps
    batch, tokens, width = qkv.shape
    shape = (batch, width // (3 * spec.HEAD_DIM), tokens, spec.HEAD_DIM)
    return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape)


@qkv_norm_rope_fp8.register_fake
def _fake_fp8(
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    del q_gain, k_gain, rope_cos, rope_sin, q_scale, k_scale, v_scale, eps
    batch, tokens, width = qkv.shape
    heads = width // (3 * spec.HEAD_DIM)
    rows = (batch, heads, tokens, spec.HEAD_DIM)
    columns = (batch, heads, spec.HEAD_DIM, spec.padded_tokens(tokens))
    q, k, v = (qkv.new_empty(shape, dtype=torch.float8_e4m3fn) for shape in (rows, rows, columns))
    return q, k, v
