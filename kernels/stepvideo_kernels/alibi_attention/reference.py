"""The formula in torch operations; also what the op does on a CPU.

Axes: B batch, L tokens, H query heads, G key/value groups, 128 channels of a head.

    qkv          = [q of head 0 .. H-1 | k, v of group 0 | k, v of group 1 | ...], each 128 wide
    scores_ij    = q_i . k_j / sqrt(128) - slope_h sqrt(i - j)        for j <= i
    out_i        = sum_j softmax_j(scores_ij) v_j                     head h reads group h // (H / G)
    slope_h      = 2^(-8 h / n), h = 1 .. n, n the largest power of two up to H; further heads take every other slope of
                   the series for 2n: 2^(-4 h / n), h = 1, 3, 5, ...

Sources: ALiBi arXiv 2108.12409, section 3; its square root is that of Step-LLM (arXiv 2502.10248); groups arXiv
2305.13245.
"""

import math

import torch
from torch import Tensor

HEAD_DIM = 128


def alibi_slopes(heads: int) -> Tensor:
    """[heads] fp32, all in (0, 1]."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    slopes += [2 ** (-4 * h / n) for h in range(1, 2 * (heads - n), 2)]
    return torch.tensor(slopes)


def alibi_attention(qkv: Tensor, slopes: Tensor) -> Tensor:
    """qkv [B, L, 128 (H + 2 G)], slopes [H] fp32 -> [B, L, 128 H] in qkv's type.

    Scores, bias and softmax are in fp32 (fp64 for fp64), the weights are rounded to qkv's type.
    """
    heads = slopes.shape[0]
    q, pairs = qkv.split([heads * HEAD_DIM, qkv.shape[2] - heads * HEAD_DIM], dim=-1)
    q = _wide(q.unflatten(-1, (heads, HEAD_DIM)).transpose(1, 2))
    k, v = pairs.unflatten(-1, (-1, 2 * HEAD_DIM)).transpose(1, 2).split(HEAD_DIM, dim=-1)
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    positions = torch.arange(qkv.shape[1], device=qkv.device)
    distance = positions[:, None] - positions[None, :]
    bias = slopes.to(q.dtype).view(-1, 1, 1) * distance.clamp(min=0).to(q.dtype).sqrt()
    scores = q @ _wide(k).transpose(2, 3) * HEAD_DIM**-0.5 - bias
    weights = scores.masked_fill(distance < 0, float("-inf")).softmax(-1).to(qkv.dtype)
    return (_wide(weights) @ _wide(v)).to(qkv.dtype).transpose(1, 2).flatten(2)


def _wide(x: Tensor) -> Tensor:
    """At least fp32: fp64 stays, so that the formula can also be computed exactly."""
    return x if x.dtype == torch.float64 else x.float()
