"""The flow-matching loop."""

from collections.abc import Callable, Iterator

from torch import Tensor

from stepvideo_serve.sampling.schedule import euler_step

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
