"""Step-LLM, the language model whose last hidden states condition the DiT.

Causal transformer without positions other than a bias of -slope_h * sqrt(i - j) on the attention scores
("sqrt-ALiBi"), grouped-query attention, RMS norm, SwiGLU, no final norm.
Sources: Step-Video-T2V report (arXiv 2502.10248); ALiBi (arXiv 2108.12409) for the slopes; the square root is what
the published Step-1 code computes (the official attention kernel is a closed binary).
Axes: B batch, L tokens, D width, H query heads, G key/value groups, d channels of a head.
With `shards` > 1 a module holds one of that many equal slices of the groups and their heads, or of the hidden channels
(text/sharding.py), H counts its own heads, and its result is partial: the sum over all shards is the whole one.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.weights.json_file import integer, read_json_object

FFN_ROUNDING = 256
LAYERS_PREFIX = "transformer.layers."  # of the keys of layers in a checkpoint


@dataclass(frozen=True)
class StepLLMConfig:
    """The part of `step_llm/config.json` that the encoder needs."""

    width: int
    num_heads: int
    num_groups: int
    num_layers: int
    ffn_width: int
    vocab_size: int
    norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @classmethod
    def load(cls, path: Path) -> "StepLLMConfig":
        """Raises CheckpointError."""
        values, source = read_json_object(path), str(path)
        eps = values.get("layernorm_epsilon")
        if type(eps) is not float:
            raise CheckpointError(f"{source} must give layernorm_epsilon as a number, found {eps!r}.")
        ffn = integer(values, "ffn_hidden_size", source)
        return cls(
            width=integer(values, "hidden_size", source),
            num_heads=integer(values, "num_attention_heads", source),
            num_groups=integer(values, "num_attention_groups", source),
            num_layers=integer(values, "num_layers", source),
            ffn_width=math.ceil(ffn / FFN_ROUNDING) * FFN_ROUNDING,
            vocab_size=integer(values, "padded_vocab_size", source),
            norm_eps=eps,
        )


class RMSNorm(nn.Module):
    """x / rms(x) * weight, all computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention; wqkv holds all queries, then key and value of each group side by side."""

    def __init__(self, config: StepLLMConfig, shards: int = 1) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries = config.width // shards
        keys_values = 2 * config.head_dim * config.num_groups // shards
        self.wqkv = nn.Linear(config.width, self.queries + keys_values, bias=False)
        self.wo = nn.Linear(self.queries, config.width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, D], bias [H, L, L] added to the scores -> [B, L, D]."""
        queries, pairs = self.wqkv(x).split([self.queries, self.wqkv.out_features - self.queries], dim=-1)
        q = queries.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = pairs.unflatten(-1, (-1, 2 * self.head_dim)).transpose(1, 2).split(self.head_dim, dim=-1)
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202); w1 packs gate and up."""

    def __init__(self, width: int, hidden: int) -> None:
        """`hidden`: the channels of this shard."""
        super().__init__()
        self.w1 = nn.Linear(width, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: StepLLMConfig, shards: int = 1) -> None:
        super().__init__()
        self.attention = Attention(config, shards)
        self.feed_forward = FeedForward(config.width, config.ffn_width // shards)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.feed_forward(self.ffn_norm(x))


class TokenEmbeddings(nn.Module):
    """Holds the table under its official name."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width)


class Transformer(nn.Module):
    """Holds the layers under their official name."""

    def __init__(self, config: StepLLMConfig, shards: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, shards) for _ in range(config.num_layers))


class StepLLM(nn.Module):
    """Token ids -> hidden states of the last layer. `forward` needs the whole network."""

    def __init__(self, config: StepLLMConfig, shards: int = 1) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = TokenEmbeddings(config.vocab_size, config.width)
        self.transformer = Transformer(config, shards)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, L] int64 -> [B, L, D].

        Attention is causal, so the states of real tokens do not depend on padding behind them: callers give the
        real tokens only.
        """
        bias = sqrt_alibi_bias(alibi_slopes(self.config.num_heads), input_ids.shape[1], input_ids.device)
        x = self.tok_embeddings.word_embeddings(input_ids)
        for layer in self.transformer.layers:
            x = layer(x, bias)
        return x


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head: 2^(-8k/n) for n the largest power of two up to `heads`; further heads take every other
    slope of the series for 2n (arXiv 2108.12409, section 3)."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * k / n) for k in range(1, n + 1)]
    return slopes + [2 ** (-4 * k / n) for k in range(1, 2 * (heads - n), 2)]


def sqrt_alibi_bias(slopes: list[float] | Tensor, length: int, device: torch.device) -> Tensor:
    """[len(slopes), L, L] fp32: -slope * sqrt(i - j) where key j is not after query i, minus infinity elsewhere."""
    positions = torch.arange(length, device=device)
    distance = (positions[:, None] - positions[None, :]).float()
    of_heads = slopes if isinstance(slopes, Tensor) else torch.tensor(slopes, device=device)
    bias = -of_heads[:, None, None] * distance.clamp(min=0).sqrt()
    return bias.masked_fill(distance < 0, float("-inf"))
