"""The formula in torch operations; also what the ops do on a CPU.

Axes: B batch, H heads, N queries, L keys, 128 channels of a head.

    scores = q k^T / sqrt(128)            [N, L] for each batch entry and head
    out    = softmax(scores) v            over all keys

FP8: q, k and v are E4M3 values times a scale of their head. The weights too are multiplied in E4M3: with m the row's
largest score, P = e4m3(2^8 exp(scores - m)) and out = P v / sum(2^8 exp(scores - m)). The factor 2^8 uses the range
of E4M3 (up to 448): a weight keeps its 3 bits down to 2^-14 of the row's largest and vanishes below 2^-18.
Source: arXiv 2205.14135; FP8 as in arXiv 2407.08608, section 3.3, without its incoherent processing.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

HEAD_DIM = 128
WEIGHT_SCALE_LOG2 = 8


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, N, 128], k and v [B, H, L, 128] -> [B, N, 128 H] in q's type."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention_fp8(q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor) -> Tensor:
    """E4M3 q [B, H, N, 128], k [B, H, L, 128] and v [B, H, 128, M], scales [H] fp32 > 0 -> [B, N, 128 H] bf16.

    v is transposed, M is L rounded up to a multiple of 16, and its columns from L on are not used.
    """
    keys = k.shape[2]
    scores = (q.float() @ k.float().transpose(2, 3)) * (q_scale * k_scale).view(-1, 1, 1) * HEAD_DIM**-0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * 2.0**WEIGHT_SCALE_LOG2
    out = weights.to(torch.float8_e4m3fn).float() @ v[..., :keys].float().transpose(2, 3)
    out = out / weights.sum(-1, keepdim=True) * v_scale.view(-1, 1, 1)
    return out.to(torch.bfloat16).transpose(1, 2).flatten(2)
