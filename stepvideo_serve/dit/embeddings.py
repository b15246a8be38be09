"""What enters the DiT around its blocks: timestep, motion score and text.

Names of modules and parameters are those of the official checkpoint.
Sources: adaLN-single and the caption projection from PixArt-alpha (arXiv 2310.00426), sinusoids from DDPM.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SINUSOID_CHANNELS = 256
TIMESTEP_SCALE = 1000.0


def sinusoid_frequencies(channels: int = SINUSOID_CHANNELS) -> list[float]:
    """10000^(-i / (channels/2)) in fp32, the same bits in every backend: angles near 1000 magnify a last-bit change."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device="cpu") / half
    frequencies: list[float] = torch.exp(-math.log(10000.0) * exponents).tolist()
    return frequencies


def sinusoidal_embedding(values: Tensor, frequencies: list[float]) -> Tensor:
    """[n] fp32 -> [n, 2 * len(frequencies)] fp32: cosines, then sines, of value * frequency."""
    angles = values.float()[:, None] * torch.tensor(frequencies, device=values.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ScalarEmbedder(nn.Module):
    """One scalar per sample -> width: sinusoid, linear, SiLU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = sinusoid_frequencies()
        self.linear_1 = nn.Linear(SINUSOID_CHANNELS, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        x = sinusoidal_embedding(values, self.frequencies).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


class ConditionEmbedding(nn.Module):
    """Sum of the embeddings of the timestep (scaled to 0..1000, in fp32) and of the motion score."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = ScalarEmbedder(width)
        self.motion_score_embedder = ScalarEmbedder(width)

    def forward(self, timestep: Tensor, motion_score: Tensor) -> Tensor:
        return self.timestep_embedder(timestep.float() * TIMESTEP_SCALE) + self.motion_score_embedder(motion_score)


class AdaLayerNormSingle(nn.Module):
    """Timestep [n] in 0..1 and motion score [n] -> modulation [n, 6, width] and the embedding [n, width] itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = ConditionEmbedding(width)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor, motion_score: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.emb(timestep, motion_score)
        return self.linear(F.silu(embedding)).unflatten(-1, (6, -1)), embedding


class CaptionProjection(nn.Module):
    """Text states of the LLM -> width: linear, GELU (tanh), linear."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(states), approximate="tanh"))
