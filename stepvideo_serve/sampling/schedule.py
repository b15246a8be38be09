"""The time grid of the flow: 0 is noise, 1 is the video."""

import torch
from torch import Tensor


def flow_times(steps: int, shift: float) -> Tensor:
    """Times from 0 (up to fp32 rounding) rising to 1 as fp32 [steps + 1].

    t = 1 - s * u / (1 + (s - 1) * u) with u falling from 1 to 0 in equal parts: a shift s above 1 spends more of the
    steps near the noise. Source: Stable Diffusion 3 (arXiv 2403.03206), section 5.3.2.
    """
    noise_level = torch.linspace(1, 0, steps + 1)
    return 1 - shift * noise_level / (1 + (shift - 1) * noise_level)


def euler_step(latents: Tensor, velocity: Tensor, times: Tensor, step: int) -> Tensor:
    """x + v * (t[step + 1] - t[step]) in fp32."""
    return latents.float() + velocity.float() * (times[step + 1] - times[step]).to(latents.device)
