"""One request's denoising, from its noise and conditions to the clean latents, on whatever runs the DiT."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepvideo_serve.dit.velocity import DiTVelocity
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request.field import Setting
from stepvideo_serve.request.presets import EVALUATED, EXACT_PRESET, Preset
from stepvideo_serve.request.settings import chosen_preset
from stepvideo_serve.sampling.denoise import denoise, flow_times, guide, needs_guidance
from stepvideo_serve.sampling.evaluation import Agree, EvaluatedSteps, EvaluationPlan, LoopState, own_decision
from stepvideo_serve.sampling.host_copy import HostCopy, steps_behind
from stepvideo_serve.text.states import TextStates

Message = tuple[dict[str, Any], dict[str, NDArray[Any]]]
"""Parameters (JSON) and tensors by name: a job on its way to the ranks, the same in every process."""


@dataclass(frozen=True)
class DenoiseJob:
    """All that the loop needs.

    latents     fp32 [F, C, h, w], noise or what a step left
    condition   fp32 [C, h, w], the latent of the first image
    positive    states of the prompt
    negative    states of the negative prompt, None without guidance
    settings    the request's values that the ranks need, by attribute (request.rank_settings)
    timeout_s   for whoever runs the job to watch, at step boundaries
    start_step  above 0, the job goes on with the latents after that step, and with its `state` where `preset` forecasts
                steps
    """

    latents: Tensor
    condition: Tensor
    positive: TextStates
    negative: TextStates | None
    settings: Mapping[str, Setting]
    timeout_s: float | None = None
    start_step: int = 0
    preset: Preset = EXACT_PRESET
    state: LoopState | None = None

    @property
    def steps(self) -> int:
        return int(self.settings["steps"])

    @property
    def cfg_scale(self) -> float:
        return float(self.settings["cfg_scale"])

    @property
    def time_shift(self) -> float:
        return float(self.settings["time_shift"])

    @property
    def motion_score(self) -> float:
        return float(self.settings["motion_score"])

    @property
    def preview_every(self) -> int:
        """Steps between two previews; 0 means no previews."""
        return int(self.settings["preview_every"])

    @property
    def guided(self) -> bool:
        """Whether the job has a negative branch."""
        return self.negative is not None and needs_guidance(self.cfg_scale)

    def plan(self) -> EvaluationPlan:
        """Raises InvalidRequest when the preset does not fit the settings."""
        times = flow_times(self.steps, self.time_shift)
        return EvaluationPlan.of(self.preset, times, self.guided, self.cfg_scale, self.time_shift)

    def message(self) -> Message:
        """The job from its beginning, for `from_message`; deadline and progress are not part of the message."""
        tensors = {
            "latents": self.latents.float().numpy(),
            "condition": self.condition.numpy(),
            "positive_llm": self.positive.llm.numpy(),
            "positive_clip": self.positive.clip.numpy(),
        }
        if self.negative is not None:
            tensors |= {"negative_llm": self.negative.llm.numpy(), "negative_clip": self.negative.clip.numpy()}
        return {"kind": "denoise", "settings": dict(self.settings)}, tensors

    @classmethod
    def from_message(
        cls, params: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], presets: Mapping[str, Preset]
    ) -> "DenoiseJob":
        """The job of a message, from where it stands: params["start_step"] and params["state"] are its progress.

        Raises InvalidRequest when a tensor is missing, not finite, or does not fit, or QUALITY does not.
        """
        positive = _text(tensors, "positive")
        if positive is None:
            raise InvalidRequest("positive_llm must hold the prompt's states, got none: call the model ti2v instead.")
        latents, condition = finite_tensor(tensors, "latents", 4), finite_tensor(tensors, "condition", 3)
        if latents.shape[1:] != condition.shape:
            raise InvalidRequest(
                f"condition must be one frame of latents {list(latents.shape)}, got {list(condition.shape)}."
            )
        state = params.get("state")
        return cls(
            latents=latents,
            condition=condition,
            positive=positive,
            negative=_text(tensors, "negative"),
            settings=params["settings"],
            preset=chosen_preset(params["settings"], presets),
            start_step=params.get("start_step", 0),
            state=None if state is None else LoopState.restored(state, _velocities(state, tensors)),
        )


def finite_tensor(tensors: Mapping[str, NDArray[Any]], name: str, dimensions: int) -> Tensor:
    """The finite tensor of that many dimensions. Raises InvalidRequest."""
    if name not in tensors or tensors[name].ndim != dimensions or not np.isfinite(tensors[name]).all():
        found = tensors[name].shape if name in tensors else "none"
        raise InvalidRequest(f"{name} must be a finite tensor of {dimensions} dimensions, got {found}.")
    return torch.from_numpy(tensors[name])


def _text(tensors: Mapping[str, NDArray[Any]], branch: str) -> TextStates | None:
    if f"{branch}_llm" not in tensors:
        return None
    return TextStates(llm=finite_tensor(tensors, f"{branch}_llm", 2), clip=finite_tensor(tensors, f"{branch}_clip", 2))


def _velocities(state: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(tensors[name]) for name in state["tensors"]}


@dataclass(frozen=True)
class StepDone:
    """After step `step` of `total_steps`.

    seconds      what it took
    preview      the latent frames as colours, uint8 [F, h, w, 3], when one was due
    latents      [F, C, h, w] so far; None where they stay with the ranks, but never at the last step
    evaluated    whether the DiT was evaluated for the step, or its velocity forecast
    evaluations  how many so far; None where whoever runs the job does not tell
    state        what to go on with; None as for evaluations
    guided       whether guidance applied
    """

    step: int
    total_steps: int
    seconds: float
    preview: NDArray[np.uint8] | None
    latents: Tensor | None
    evaluated: bool = True
    evaluations: int | None = None
    state: LoopState | None = None
    guided: bool = True


Preview = Callable[[Tensor], NDArray[np.uint8]]


@dataclass(frozen=True)
class _Begun:
    """A step that the device may still be computing."""

    step: int
    latents: HostCopy
    state: LoopState
    velocities: Mapping[int, HostCopy]

    def done(self, job: DenoiseJob, preview: Preview, plan: EvaluationPlan, began_s: float) -> StepDone:
        """Waits until the step is done; its seconds count from `began_s` (time.monotonic())."""
        latents = self.latents.wait()
        state = self.state.on({step: copy.wait() for step, copy in self.velocities.items()})
        due = job.preview_every > 0 and self.step % job.preview_every == 0 and self.step < job.steps
        image = preview(latents) if due else None
        took_s, evaluated = time.monotonic() - began_s, state.mask[-1] == EVALUATED
        guided = plan.guided[self.step - 1]
        return StepDone(self.step, job.steps, took_s, image, latents, evaluated, state.evaluations, state, guided)


def run_job(
    job: DenoiseJob,
    dit: DiTVelocity,
    preview: Preview,
    agree: Agree = own_decision,
    behind: int | None = None,
) -> Iterator[StepDone]:
    """Yields after each step; whoever iterates may stop at any step boundary, and a later job go on from there with the
    same bits.

    `agree` is called once behind each evaluated step of a job that may forecast some, on every rank in the same order.
    `behind`: how many steps are begun before one is yielded, by default what `steps_behind` says of the device: the
    steps begun are computed while whoever iterates looks at the last one, and in vain if nobody goes on.
    Raises InvalidRequest when preset or state do not fit the job.
    """
    plan, lag = job.plan(), steps_behind(dit.device) if behind is None else behind
    velocity = _velocity(job, plan, dit, agree)
    times, latents = flow_times(job.steps, job.time_shift), job.latents.to(dit.device)
    under_way: deque[_Begun] = deque()
    copies: dict[int, HostCopy] = {}
    began_s = time.monotonic()
    for step, after in enumerate(denoise(latents, times, velocity, job.start_step), start=job.start_step + 1):
        state = velocity.state
        copies = {i: copies.get(i) or HostCopy(kept) for i, kept in state.history.velocities}
        under_way.append(_Begun(step, HostCopy(after), state, copies))
        while len(under_way) > lag or (under_way and step == job.steps):
            done = under_way.popleft().done(job, preview, plan, began_s)
            began_s += done.seconds
            yield done
            began_s = began_s if lag else time.monotonic()  # with a lag the device computes while others look


def _velocity(job: DenoiseJob, plan: EvaluationPlan, dit: DiTVelocity, agree: Agree) -> EvaluatedSteps:
    """The velocity that the loop calls, with all that stays the same over its steps prepared."""
    texts = (job.positive, job.negative) if job.guided and job.negative is not None else (job.positive,)
    request = dit.prepare(tuple(job.latents.shape), job.condition, job.motion_score, texts)
    alone = dit.conditional(request) if job.guided else request

    def evaluate(latents: Tensor, at: float, with_guidance: bool) -> Tensor:
        if not with_guidance:
            return dit(latents, at, alone)[0]
        branches = dit(latents, at, request)
        return guide(branches[0], branches[1], job.cfg_scale)

    state = job.state
    if state is not None:
        state = state.on({step: kept.to(dit.device) for step, kept in state.history.velocities})
    return EvaluatedSteps(plan, evaluate, job.start_step, state, agree)
