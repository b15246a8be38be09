"""One request's denoising, from its noise and conditions to the clean latents, on whatever runs the DiT."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stepvideo_serve.dit.velocity import GuidedVelocity
from stepvideo_serve.presets import EVALUATED, EXACT_PRESET, Preset
from stepvideo_serve.sampling.denoise import denoise, flow_times, guide, needs_guidance
from stepvideo_serve.sampling.evaluation import Agree, EvaluatedSteps, EvaluationPlan, LoopState, own_decision
from stepvideo_serve.text.states import TextStates


@dataclass(frozen=True)
class DenoiseJob:
    """All that the loop needs. latents [F, C, h, w] and condition [C, h, w] are fp32; `negative` is None without
    guidance; `preview_every` 0 means no previews; `timeout_s` is for whoever runs the job to watch, at step boundaries;
    `start_step` > 0 resumes with the latents after that step, and with its `state` where `preset` forecasts steps."""

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
    preset: Preset = EXACT_PRESET
    state: LoopState | None = None


@dataclass(frozen=True)
class StepDone:
    """After step `step` of `total_steps`: what it took, a preview uint8 [H, W, 3] when one was due, the latents
    [F, C, h, w] so far (None where they stay with the ranks, but never at the last step), whether the DiT was evaluated
    for the step or its velocity forecast, the count of evaluations so far, and the state to go on with. `evaluations`
    and `state` are None where whoever runs the job does not tell them."""

    step: int
    total_steps: int
    seconds: float
    preview: NDArray[np.uint8] | None
    latents: Tensor | None
    evaluated: bool = True
    evaluations: int | None = None
    state: LoopState | None = None


Preview = Callable[[Tensor], NDArray[np.uint8]]


def run_job(job: DenoiseJob, dit: GuidedVelocity, preview: Preview, agree: Agree = own_decision) -> Iterator[StepDone]:
    """Yields after each step; whoever iterates may stop at any step boundary.

    `agree` is called once behind each evaluated step of a job that may forecast some, on every rank in the same order.
    Raises InvalidRequest when preset or state do not fit the job.
    """
    guided = job.negative is not None and needs_guidance(job.cfg_scale)
    texts = (job.positive, job.negative) if guided and job.negative is not None else (job.positive,)
    times = flow_times(job.steps, job.time_shift)
    plan = EvaluationPlan.of(job.preset, times, guided, job.cfg_scale, job.time_shift)
    request = dit.prepare(tuple(job.latents.shape), job.condition, job.motion_score, texts)
    alone = dit.conditional(request) if guided else request

    def evaluate(latents: Tensor, at: float, with_guidance: bool) -> Tensor:
        if not with_guidance:
            return dit(latents, at, alone)[0]
        branches = dit(latents, at, request)
        return guide(branches[0], branches[1], job.cfg_scale)

    velocity = EvaluatedSteps(plan, evaluate, job.start_step, job.state, agree)
    step_began_s = time.monotonic()
    for step, latents in enumerate(denoise(job.latents, times, velocity, job.start_step), start=job.start_step + 1):
        due = job.preview_every > 0 and step % job.preview_every == 0 and step < job.steps
        image = preview(latents) if due else None
        now_s = time.monotonic()
        state = velocity.state
        evaluated = state.mask[-1] == EVALUATED
        yield StepDone(step, job.steps, now_s - step_began_s, image, latents, evaluated, state.evaluations, state)
        step_began_s = time.monotonic()
