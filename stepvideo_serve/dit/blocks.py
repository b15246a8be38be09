"""One DiT block: self-attention with q/k norm and 3D RoPE, cross-attention to the text, feed-forward.

Axes: B batch, N video tokens, L text tokens, H heads, D width = 128 * H.
The number of heads is inferred from the weights. With `shards` > 1 a module holds one of that many equal slices of the
heads or hidden channels (dit/sharding.py), H counts its own heads, and the attentions and the feed-forward return
partial sums: the sum over all shards is the whole result.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepvideo_serve.dit.config import BLOCK_NORM_EPS, FFN_MULTIPLE, HEAD_DIM, QK_NORM_EPS
from stepvideo_serve.dit.rope import apply_rope


class HeadNorm(nn.Module):
    """RMS norm over a head's channels, gain included, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (HEAD_DIM,), self.weight.float(), QK_NORM_EPS).to(x.dtype)


class AttentionCore(nn.Module):
    """`attend` as a module without weights, so that an export can put a fused or quantised one in its place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


class SelfAttention(nn.Module):
    """Full attention among video tokens; wqkv is interleaved per head: q, k and v of head 0, then of head 1, ..."""

    def __init__(self, width: int, shards: int = 1) -> None:
        super().__init__()
        self.wqkv = nn.Linear(width, 3 * width // shards, bias=False)
        self.wo = nn.Linear(width // shards, width, bias=False)
        self.q_norm = HeadNorm()
        self.k_norm = HeadNorm()
        self.core = AttentionCore()

    def project(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D], tables [N, 128] -> queries, keys and values, each [B, H, N, 128]."""
        q, k, v = self.wqkv(x).unflatten(-1, (-1, 3 * HEAD_DIM)).split(HEAD_DIM, dim=-1)
        q = apply_rope(self.q_norm(q), rope_cos, rope_sin)
        k = apply_rope(self.k_norm(k), rope_cos, rope_sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        """x [B, N, D], tables [N, 128] -> [B, N, D]."""
        return self.wo(self.core(*self.project(x, rope_cos, rope_sin)))


class CrossAttention(nn.Module):
    """Attention of video tokens to the text, whose keys and values do not depend on the step and are given."""

    def __init__(self, width: int, shards: int = 1) -> None:
        super().__init__()
        self.wq = nn.Linear(width, width // shards, bias=False)
        self.wkv = nn.Linear(width, 2 * width // shards, bias=False)
        self.wo = nn.Linear(width // shards, width, bias=False)
        self.q_norm = HeadNorm()
        self.k_norm = HeadNorm()
        self.core = AttentionCore()

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context [B, L, D] -> keys and values, each [B, H, L, 128]; wkv is interleaved per head."""
        k, v = self.wkv(context).unflatten(-1, (-1, 2 * HEAD_DIM)).split(HEAD_DIM, dim=-1)
        return self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = self.q_norm(self.wq(x).unflatten(-1, (-1, HEAD_DIM)))
        return self.wo(self.core(q.transpose(1, 2), keys, values))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(128)) v without a mask: [B, H, N, 128] and [B, H, L, 128] twice -> [B, N, H * 128]."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ModulatedNorm(nn.LayerNorm):
    """LayerNorm with adaLN behind it; an export can put a fused one in its place. scale and shift are [B, 1, D]."""

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        return modulate(self(x), scale, shift)

    def modulated_sum(self, x: Tensor, branch: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """x and branch [B, N, D] -> their sum, and the sum normed and modulated."""
        total = x + branch
        return total, self.modulated(total, scale, shift)


class ProjectedGelu(nn.Module):
    """Linear, then GELU (tanh)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear to four times the width, GELU (tanh), linear back; the identity keeps the official parameter names."""

    def __init__(self, width: int, shards: int = 1) -> None:
        super().__init__()
        hidden = FFN_MULTIPLE * width // shards
        self.net = nn.Sequential(ProjectedGelu(width, hidden), nn.Identity(), nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DiTBlock(nn.Module):
    """x += gate1 * attn1(mod(norm1(x))); x += attn2(x, text); x += gate2 * ff(mod(norm2(x))).

    `forward` needs the whole block; with shards, the parts run one by one with a sum over the shards after each.
    """

    def __init__(self, width: int, shards: int = 1) -> None:
        super().__init__()
        self.norm1 = ModulatedNorm(width, eps=BLOCK_NORM_EPS)
        self.attn1 = SelfAttention(width, shards)
        self.attn2 = CrossAttention(width, shards)
        self.norm2 = ModulatedNorm(width, eps=BLOCK_NORM_EPS)
        self.ff = FeedForward(width, shards)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))

    def forward(
        self, tokens: Tensor, modulation: Tensor, rope_cos: Tensor, rope_sin: Tensor, cross_k: Tensor, cross_v: Tensor
    ) -> Tensor:
        """tokens [B, N, D], modulation [B, 6, D], tables [N, 128], cross_k and cross_v [B, H, L, 128] -> [B, N, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).split(1, dim=1)
        x = tokens + gate1 * self.attn1(self.norm1.modulated(tokens, scale1, shift1), rope_cos, rope_sin)
        x, y = self.norm2.modulated_sum(x, self.attn2(x, cross_k, cross_v), scale2, shift2)
        return x + gate2 * self.ff(y)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """adaLN: x * (1 + scale) + shift, scale and shift [B, 1, D]."""
    return x * (1 + scale) + shift
