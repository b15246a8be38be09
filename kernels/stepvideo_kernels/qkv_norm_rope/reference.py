"""The formula in torch operations; also what the op does on a CPU.

Axes: B batch, N tokens, H heads, 128 channels of a head.

    [q | k | v] of head h   = qkv[:, :, 384 h : 384 (h + 1)] in three parts of 128
    norm(x)_c               = x_c / sqrt(mean_c(x^2) + eps) * gain_c
    rope(x)_c               = x_c cos_c - x_{c + p/2} sin_c     for c in the first half of its part
    rope(x)_{c + p/2}       = x_{c + p/2} cos_c + x_c sin_c     for its partner in the second half
    q, k                    = rope(norm(q)), rope(norm(k)), in fp32 throughout, rounded once
    FP8                     : stored = clamp(x / scale_h, -448, 448) in E4M3, so x = stored * scale_h

The three parts (frame, row, column) have p = 64, 32 and 32 channels, so that a pair's members are p/2 apart.
Both turn by the same angle: the tables' values for the second half of a part are not read.
Sources: RMS norm arXiv 1910.07467; RoPE arXiv 2104.09864; its split by axis arXiv 2502.10248.
"""

import torch
from torch import Tensor

from stepvideo_kernels.kernel_spec import FP8_MAX
from stepvideo_kernels.qkv_norm_rope import spec

ROPE_SPLIT = (64, 32, 32)


def qkv_norm_rope(
    qkv: Tensor, q_gain: Tensor, k_gain: Tensor, rope_cos: Tensor, rope_sin: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, N, 384 H], gains [128], tables [N, 128] fp32 -> q, k, v, each [B, H, N, 128] in qkv's type."""
    q, k, v = _split(qkv)
    q = _rope(_norm(q, q_gain, eps), rope_cos, rope_sin)
    k = _rope(_norm(k, k_gain, eps), rope_cos, rope_sin)
    return q.to(qkv.dtype).contiguous(), k.to(qkv.dtype).contiguous(), v.contiguous()


def qkv_norm_rope_fp8(
    qkv: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    rope_cos: Tensor,
    rope_sin: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with scales [H] fp32 -> E4M3 q and k [B, H, N, 128] and v [B, H, 128, M].

    v is transposed and padded with zeros to M, the next multiple of 16 from N: FP8 tensor cores read both operands
    along the summed axis, which for v is the tokens, and rows must start at multiples of 16 bytes.
    """
    q, k, v = _split(qkv)
    q = _rope(_norm(q, q_gain, eps), rope_cos, rope_sin)
    k = _rope(_norm(k, k_gain, eps), rope_cos, rope_sin)
    tokens = qkv.shape[1]
    v = torch.nn.functional.pad(_wide(v).transpose(2, 3), (0, spec.padded_tokens(tokens) - tokens))
    return to_fp8(q, q_scale), to_fp8(k, k_scale), to_fp8(v, v_scale)


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x [B, H, ...] divided by its head's scale [H], clamped, rounded to nearest even."""
    divided = x.float() / scale.view(-1, 1, 1).float()
    return divided.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).contiguous()


def _split(qkv: Tensor) -> tuple[Tensor, ...]:
    """[B, N, 384 H] -> three times [B, H, N, 128]."""
    by_head = qkv.unflatten(-1, (-1, 3 * spec.HEAD_DIM)).transpose(1, 2)
    q, k, v = by_head.split(spec.HEAD_DIM, dim=-1)
    return q, k, v


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain.to(wide.dtype)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = []
    for part, cosines, sines in zip(*(one.split(ROPE_SPLIT, -1) for one in (x, cos, sin)), strict=True):
        first, second = part.chunk(2, -1)
        c, s = (table.chunk(2, -1)[0].to(x.dtype) for table in (cosines, sines))
        turned += [first * c - second * s, second * c + first * s]
    return torch.cat(turned, -1)


def _wide(x: Tensor) -> Tensor:
    """At least fp32: fp64 stays, so that the formula can also be computed exactly."""
    return x if x.dtype == torch.float64 else x.float()
