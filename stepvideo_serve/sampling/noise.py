"""The noise of a request, drawn on the CPU so that a seed gives the same video on any hardware and layout.

The official code starts every run from the same noise, whatever its seed; here the seed decides everything.
"""

import torch
from torch import Tensor


def request_noise(seed: int, latent_shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Standard normal noise for the latents [F, C, h, w] and for the image's posterior [1, C, h, w], both fp32."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(latent_shape, generator=generator),
        torch.randn((1, *latent_shape[1:]), generator=generator),
    )
