"""The flow-matching loop: noise, time grid, guidance, and the Euler steps.

The seed decides the noise, drawn on the CPU, so that a seed gives the same video on any hardware and layout; the
official code starts every run from the same noise. Times run from 0 (noise) to 1 (video).
Guidance: classifier-free (arXiv 2207.12598).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale * (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)


def needs_guidance(scale: float) -> bool:
    """At a scale of 1 or less the official pipeline follows the prompt alone; so do we, at half the cost."""
    return scale > 1.0


def flow_times(steps: int, shift: float) -> Tensor:
    """Times from 0 (up to fp32 rounding) rising to 1 as fp32 [steps + 1].

    t = 1 - s * u / (1 + (s - 1) * u) with u falling from 1 to 0 in equal parts: a shift s above 1 spends more of the
    steps near the noise. Source: Stable Diffusion 3 (arXiv 2403.03206), section 5.3.2.
    """
    noise_level = torch.linspace(1, 0, steps + 1)
    return 1 - shift * noise_level / (1 + (shift - 1) * noise_level)


def euler_step(latents: Tensor, velocity: Tensor, times: Tensor, step: int) -> Tensor:
    """x + v * (t[step + 1] - t[step]) in fp32, on the device of both; times are on the CPU, and one of them is a number
    to any device, for which nobody waits."""
    return latents.float() + velocity.float() * (times[step + 1] - times[step])


def request_noise(seed: int, latent_shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Standard normal noise for the latents [F, C, h, w] and for the image's posterior [1, C, h, w], both fp32."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(latent_shape, generator=generator),
        torch.randn((1, *latent_shape[1:]), generator=generator),
    )


Velocity = Callable[[Tensor, float], Tensor]
"""(latents [F, C, h, w] fp32, time in 0..1) -> velocity of the same shape."""


def denoise(latents: Tensor, times: Tensor, velocity: Velocity, start: int = 0) -> Iterator[Tensor]:
    """Carries latents [F, C, h, w] from times[start] to the last of times [steps + 1] by Euler steps in fp32.

    Yields the latents after each step, and computes a step only when it is asked for. Started again at `start` from
    the latents of that step it gives the same bits.
    """
    latents = latents.float()
    for step in range(start, len(times) - 1):
        latents = euler_step(latents, velocity(latents, float(times[step])), times, step)
        yield latents
