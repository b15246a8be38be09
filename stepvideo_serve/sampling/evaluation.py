"""When the DiT is evaluated, and what stands for its velocity where it is not.

    History           velocities of the last evaluated steps -> the forecast for a later time
    EvaluationPlan    preset and schedule -> which step is evaluated next, given the history
    LoopState         all that a loop must know, besides its latents, to go on with the same bits
    EvaluatedSteps    the three at work: the velocity that the loop calls at each step

The forecast is linear in time through the last two evaluated velocities. Guidance is linear, so guided velocities need
no history of their own branches. The adaptive rule is EasyCache's (arXiv 2507.02860), with a forecast where that one
reuses: it follows the estimated relative change of the velocity since the last evaluation.

After an evaluated step everything is decided until the next one: the forecasts, hence the path, hence the rule's sum.
So a decision is one number, the next step to evaluate, and one rank's decision can hold for all (`agree`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request.presets import EVALUATED, FORECAST, LEAST_STEPS, Preset, fixed_fault

ORDER: Final = 1
KEPT: Final = ORDER + 1
"""How many velocities a forecast is made of."""

Evaluate = Callable[[Tensor, float, bool], Tensor]
"""(latents [F, C, h, w] fp32, time, whether guidance applies) -> velocity of the same shape."""
Agree = Callable[[int], int]
"""A rank's next step to evaluate -> the leader's."""


def own_decision(step: int) -> int:
    """The agreement of a single rank."""
    return step


@dataclass(frozen=True)
class History:
    """Velocities [F, C, h, w] fp32 of the last evaluated steps under the same guidance: none, one or two, by step."""

    velocities: tuple[tuple[int, Tensor], ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(step for step, _ in self.velocities)

    def with_velocity(self, step: int, velocity: Tensor) -> "History":
        """The history behind one more evaluated step."""
        return History((*self.velocities, (step, velocity))[-KEPT:])

    def forecast(self, times: tuple[float, ...], step: int) -> Tensor:
        """The velocity at times[step]; with one velocity it is that one. The history must not be empty."""
        _, last = self.velocities[-1]
        if len(self.velocities) < KEPT:
            return last
        return last + (last - self.velocities[-2][1]) * self.ahead(times, times[step])

    def distance(self, times: tuple[float, ...], step: int) -> float:
        """How far (2-norm) the latents go from the last evaluated step to the beginning of `step`, on forecasts."""
        last_step, last = self.velocities[-1]
        spans = [(times[i], times[i + 1] - times[i]) for i in range(last_step, step)]
        moved = last * sum(span for _, span in spans)
        if len(self.velocities) == KEPT:
            bend = sum(span * self.ahead(times, time) for time, span in spans)
            moved = moved + (last - self.velocities[-2][1]) * bend
        return float(moved.double().norm())

    def ahead(self, times: tuple[float, ...], time: float) -> float:
        """How many of the spans between the two velocities `time` lies behind the later one."""
        before, last = (times[step] for step in self.steps)
        return (time - last) / (last - before)


@dataclass(frozen=True)
class EvaluationPlan:
    """times: those of the schedule [steps + 1]; guided: per step, whether guidance applies."""

    preset: Preset
    times: tuple[float, ...]
    guided: tuple[bool, ...]

    @classmethod
    def of(cls, preset: Preset, times: Tensor, guided: bool, cfg_scale: float, time_shift: float) -> "EvaluationPlan":
        """times: fp32 [steps + 1]; guided: whether the request has a negative branch at all.

        Raises InvalidRequest for a fixed preset at other settings than its mask's, or a mask without the steps at
        which guidance sets in or ends.
        """
        moments = tuple(float(time) for time in times)
        inside = tuple(
            guided and max(time, 0.0) >= preset.guidance_from and (time < preset.guidance_to or preset.guidance_to == 1)
            for time in moments[:-1]
        )
        plan = cls(preset, moments, inside)
        if preset.mask is not None:
            plan._check_mask(preset.mask, cfg_scale, time_shift)
        return plan

    @property
    def steps(self) -> int:
        return len(self.guided)

    @property
    def needs_history(self) -> bool:
        """Whether any step may be forecast."""
        if self.preset.mask is not None:
            return FORECAST in self.preset.mask
        return self.preset.rule != "exact" and self.steps >= LEAST_STEPS

    def begins_anew(self, step: int) -> bool:
        """Whether velocities before `step` say nothing about it: guidance sets in or ends there."""
        return step == 0 or self.guided[step] != self.guided[step - 1]

    def next_evaluation(self, history: History, moved: float) -> int:
        """The step to evaluate after the last one of `history`; `moved`: 2-norm of the latents' way between the two
        steps of the history (anything while it has one)."""
        step = history.steps[-1] + 1
        if not self.needs_history or step >= self.steps:
            return step
        if self.preset.mask is not None:
            return self.preset.mask.index(EVALUATED, step)
        return self._adaptive(history, moved)

    def _adaptive(self, history: History, moved: float) -> int:
        """Sums g * |x_i - x_(i-1)| / |v_j| over the steps behind j, with g = |v_j - v_k| / |x_j - x_k|."""
        preset, first = self.preset, history.steps[-1] + 1
        assert preset.tolerance is not None
        assert preset.dense_start is not None
        assert preset.dense_end is not None
        assert preset.longest_streak is not None
        if len(history.velocities) < KEPT:
            return first
        (_, before), (_, last) = history.velocities
        speed = _Speed.of(last, last - before)
        if not (moved > 0 and speed.last > 0):  # nothing moves, or it is not finite: there is no rate of change
            return first
        rate = math.sqrt(speed.difference) / moved / math.sqrt(speed.last)
        total = 0.0
        for step in range(first, self.steps - 1):
            time, earlier = self.times[step], self.times[step - 1]
            total += rate * (time - earlier) * speed.at(history.ahead(self.times, earlier))
            dense = time < preset.dense_start or time >= preset.dense_end or self.begins_anew(step)
            if dense or step - first >= preset.longest_streak or not total < preset.tolerance:
                return step
        return self.steps - 1

    def _check_mask(self, mask: str, cfg_scale: float, time_shift: float) -> None:
        if (fault := fixed_fault(self.preset, self.steps, cfg_scale, time_shift)) is not None:
            raise InvalidRequest(fault)
        if skipped := [i for i, digit in enumerate(mask) if digit == FORECAST and self.begins_anew(i)]:
            raise InvalidRequest(
                f"The mask must evaluate step {skipped[0] + 1}, where guidance sets in or ends, got 0: correct it."
            )


@dataclass(frozen=True)
class _Speed:
    """The 2-norm of last + c * difference as a function of c, from three products."""

    last: float
    mixed: float
    difference: float

    @classmethod
    def of(cls, last: Tensor, difference: Tensor) -> "_Speed":
        a, b = last.double().flatten(), difference.double().flatten()
        return cls(float(a @ a), float(a @ b), float(b @ b))

    def at(self, ahead: float) -> float:
        square = self.last + 2 * ahead * self.mixed + ahead * ahead * self.difference
        return math.sqrt(square) if not square < 0 else 0.0  # below 0 by rounding only


@dataclass(frozen=True)
class LoopState:
    """Where a loop stands after a step, besides its latents.

    mask             a digit per step done: "1" evaluated, "0" forecast
    next_evaluation  every step before this one (counted from 0) is forecast
    history          what the forecasts are made of; empty where nothing is ever forecast
    """

    mask: str = ""
    next_evaluation: int = 0
    history: History = History()

    @property
    def evaluations(self) -> int:
        return self.mask.count(EVALUATED)

    def scalars(self) -> dict[str, Any]:
        """JSON values, for `restored`."""
        return {"mask": self.mask, "next_evaluation": self.next_evaluation, "history": list(self.history.steps)}

    def tensors(self) -> dict[str, Tensor]:
        """The history's velocities fp32 [F, C, h, w], named by their step (counted from 0)."""
        return {velocity_name(step): velocity for step, velocity in self.history.velocities}

    def on(self, velocities: Mapping[int, Tensor]) -> "LoopState":
        """The same state with these copies of its velocities, by step."""
        return replace(self, history=History(tuple((step, velocities[step]) for step in self.history.steps)))

    @classmethod
    def restored(cls, scalars: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "LoopState":
        """What `scalars` and `tensors` were taken from; further tensors are left alone. Raises KeyError."""
        steps: list[int] = scalars["history"]
        velocities = tuple((step, tensors[velocity_name(step)]) for step in steps)
        return cls(scalars["mask"], scalars["next_evaluation"], History(velocities))


def velocity_name(step: int) -> str:
    """The name of an evaluated velocity in a LoopState's tensors."""
    return f"velocity_{step}"


class EvaluatedSteps:
    """The velocity that the loop calls: evaluated or forecast, as the plan says. `state` is that after the last call.

    Raises InvalidRequest for a state that cannot be gone on with at `start`.
    """

    def __init__(
        self,
        plan: EvaluationPlan,
        evaluate: Evaluate,
        start: int = 0,
        state: LoopState | None = None,
        agree: Agree = own_decision,
    ) -> None:
        if state is None and (start == 0 or not plan.needs_history):
            state = LoopState(EVALUATED * start, start)
        if state is None or len(state.mask) != start:
            found = "none" if state is None else f"that of step {len(state.mask)}"
            raise InvalidRequest(f"A run that goes on after step {start} needs the state of that step, got {found}.")
        self.state = state
        self._plan, self._evaluate, self._agree = plan, evaluate, agree

    def __call__(self, latents: Tensor, time: float) -> Tensor:
        """latents [F, C, h, w] fp32 entering the next step at `time` -> its velocity."""
        plan, state = self._plan, self.state
        step = len(state.mask)
        if step < state.next_evaluation:
            self.state = LoopState(state.mask + FORECAST, state.next_evaluation, state.history)
            return state.history.forecast(plan.times, step)
        velocity = self._evaluate(latents, time, plan.guided[step])
        self.state = self._behind(step, velocity)
        return velocity

    def _behind(self, step: int, velocity: Tensor) -> LoopState:
        """The state after the evaluated step, with the decision about the next one."""
        plan, mask = self._plan, self.state.mask + EVALUATED
        if not plan.needs_history:
            return LoopState(mask, step + 1)
        history = History() if plan.begins_anew(step) else self.state.history
        moved = history.distance(plan.times, step) if history.velocities else 0.0
        history = history.with_velocity(step, velocity.float())
        return LoopState(mask, self._agree(plan.next_evaluation(history, moved)), history)


def guided_share(plan: EvaluationPlan, mask: str) -> float:
    """The part of the evaluated steps that also computed the negative branch, 0 to 1."""
    evaluated = [guided for guided, digit in zip(plan.guided, mask, strict=False) if digit == EVALUATED]
    return sum(evaluated) / len(evaluated) if evaluated else 0.0
