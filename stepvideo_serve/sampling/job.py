"""One request's denoising, from its noise and conditions to the clean latents, on whatever runs the DiT."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stepvideo_serve.dit.velocity import GuidedVelocity
from stepvideo_serve.sampling.denoise import denoise, flow_times, guide, needs_guidance
from stepvideo_serve.text.states import TextStates


@dataclass(frozen=True)
class DenoiseJob:
    """All that the loop needs. latents [F, C, h, w] and condition [C, h, w] are fp32; `negative` is None without
    guidance; `preview_every` 0 means no previews; `timeout_s` is for whoever runs the job to watch, at step boundaries;
    `start_step` > 0 resumes with the latents after that step."""

    latents: Tensor
    condition: Tensor
    positive: TextStates
    negative: TextStates | None
    steps: int
    cfg_scale: float
    time_shift: float
    motion_score: float
    preview_every: int = 0
    timeout_s: float | None = None
    start_step: int = 0


@dataclass(frozen=True)
class StepDone:
    """After step `step` of `total_steps`: what it took, a preview uint8 [H, W, 3] when one was due, the latents
    [F, C, h, w] so far (None where they stay with the ranks, but never at the last step)."""

    step: int
    total_steps: int
    seconds: float
    preview: NDArray[np.uint8] | None
    latents: Tensor | None


Preview = Callable[[Tensor], NDArray[np.uint8]]


def run_job(job: DenoiseJob, dit: GuidedVelocity, preview: Preview) -> Iterator[StepDone]:
    """Yields after each step; whoever iterates may stop at any step boundary."""
    guided = job.negative is not None and needs_guidance(job.cfg_scale)
    texts = (job.positive, job.negative) if guided and job.negative is not None else (job.positive,)
    request = dit.prepare(tuple(job.latents.shape), job.condition, job.motion_score, texts)

    def velocity(latents: Tensor, at: float) -> Tensor:
        branches = dit(latents, at, request)
        return guide(branches[0], branches[1], job.cfg_scale) if guided else branches[0]

    step_began_s = time.monotonic()
    loop = denoise(job.latents, flow_times(job.steps, job.time_shift), velocity, job.start_step)
    for step, latents in enumerate(loop, start=job.start_step + 1):
        due = job.preview_every > 0 and step % job.preview_every == 0 and step < job.steps
        image = preview(latents) if due else None
        now_s = time.monotonic()
        yield StepDone(step, job.steps, now_s - step_began_s, image, latents)
        step_began_s = time.monotonic()
