"""How many steps of a run evaluate the DiT, and what that says about the run's seconds.

For `exact` and masks the number is known. For adaptive presets it is told from runs that have ended: those of the same
preset (by its parameters), steps and size, else those that are nearest to them. `dit_denoiser` keeps the counts,
`ti2v_quote` asks for them. Free of torch.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from stepvideo_serve.planning.pace import Arrays, Pace
from stepvideo_serve.request import chosen_preset
from stepvideo_serve.request.presets import EVALUATED, LEAST_STEPS, Preset
from stepvideo_serve.scheduling.progress import ResumableDenoise

RUNS_KEPT = 32  # of each preset, steps and size
KINDS_KEPT = 64

Kind = tuple[str, int, int]
"""Parameters of a preset as JSON, steps, tokens of the video."""


@dataclass(frozen=True)
class Expected:
    """Evaluations of a whole run: their mean, least and most; the part of them with both branches of guidance, 0 to 1,
    for requests that have two; `runs` that were counted, 0 where the number is known beforehand; `alike`: whether these
    had the same steps and size."""

    mean: float
    least: float
    most: float
    guided_share: float = 1.0
    runs: int = 0
    alike: bool = True


def known_evaluations(preset: Preset, steps: int) -> int | None:
    """How many steps are evaluated, where that does not depend on the run."""
    if preset.mask is not None:
        return preset.mask.count(EVALUATED)
    return steps if preset.rule == "exact" or steps < LEAST_STEPS else None


class EvaluationCounts:
    """Evaluations of runs that have ended, by preset, steps and size. Any thread may use it."""

    def __init__(self, points: Iterable[Any] = ()) -> None:
        self._lock = threading.Lock()
        self._runs: OrderedDict[Kind, list[tuple[int, int]]] = OrderedDict()
        for parameters, steps, tokens, runs in points:
            self._runs[parameters, steps, tokens] = [(int(evaluations), int(guided)) for evaluations, guided in runs]

    def note(self, preset: Preset, steps: int, tokens: int, evaluations: int, guided: int) -> None:
        """A run has ended, `guided` of whose evaluations had both branches."""
        kind = _parameters(preset), steps, tokens
        with self._lock:
            self._runs[kind] = [*self._runs.pop(kind, []), (evaluations, guided)][-RUNS_KEPT:]
            if len(self._runs) > KINDS_KEPT:
                self._runs.popitem(last=False)

    def points(self) -> list[Any]:
        """JSON values, for another's constructor."""
        with self._lock:
            return [[*kind, list(runs)] for kind, runs in self._runs.items()]

    def expected(self, preset: Preset, steps: int, tokens: int) -> Expected | None:
        """For a run; None for an adaptive preset of which no run has ended."""
        known = known_evaluations(preset, steps)
        found = self._nearest(preset, steps, tokens)
        if found is None:
            return None if known is None else Expected(known, known, known)
        (_, its_steps, its_tokens), runs = found
        guided_share = sum(guided for _, guided in runs) / sum(evaluations for evaluations, _ in runs)
        if known is not None:
            return Expected(known, known, known, guided_share)
        counts = [evaluations * steps / its_steps for evaluations, _ in runs]
        alike = (its_steps, its_tokens) == (steps, tokens)
        return Expected(sum(counts) / len(counts), min(counts), max(counts), guided_share, len(runs), alike)

    def _nearest(self, preset: Preset, steps: int, tokens: int) -> tuple[Kind, list[tuple[int, int]]] | None:
        parameters = _parameters(preset)
        with self._lock:
            same = [(kind, list(runs)) for kind, runs in self._runs.items() if kind[0] == parameters]
        far = {kind: abs(log(kind[1] / steps)) + abs(log(kind[2] / tokens)) for kind, _ in same}
        return min(same, key=lambda entry: far[entry[0]], default=None)


class RunPace:
    """What the ledger and the counts say about denoising runs."""

    def __init__(self, pace: Pace, presets: Mapping[str, Preset]) -> None:
        self._pace, self._presets = pace, presets
        self.counts = EvaluationCounts()

    def seconds_left(self, job: ResumableDenoise) -> float | None:
        """Of the steps that are left; None where steps of a kind, or runs of an adaptive preset, are not known yet."""
        preset, steps = chosen_preset(job.settings, self._presets), job.steps
        expected = self.counts.expected(preset, steps, self._pace.tokens(job.tensors))
        if expected is None:
            return None
        left = min(max(expected.mean - job.evaluations, min(job.steps_left, 1)), job.steps_left)
        if preset.mask is not None:
            left = preset.mask.count(EVALUATED, steps - job.steps_left)
        return self._seconds(job.tensors, left, job.steps_left - left, expected.guided_share)

    def ended(self, job: ResumableDenoise) -> None:
        """The job has its result."""
        preset, tokens = chosen_preset(job.settings, self._presets), self._pace.tokens(job.tensors)
        if known_evaluations(preset, job.steps) is None or not preset.guides_always:
            self.counts.note(preset, job.steps, tokens, job.evaluations, job.guided_evaluations)

    def _seconds(self, tensors: Arrays, evaluations: float, forecasts: float, guided_share: float) -> float | None:
        amounts = {
            ("step", self._pace.step_flops(tensors)): evaluations * guided_share,
            ("step", self._pace.step_flops(tensors, guided=False)): evaluations * (1 - guided_share),
            ("forecast", self._pace.values(tensors)): forecasts,
        }
        if len(amounts) == 2:  # both branches always, or one
            amounts["step", self._pace.step_flops(tensors)] = evaluations
        total = 0.0
        for (stage, work), count in amounts.items():
            if count > 0:
                seconds = self._pace.ledger.seconds(stage, work)
                if seconds is None:
                    return None
                total += count * seconds
        return total


def _parameters(preset: Preset) -> str:
    return json.dumps(preset.parameters(), sort_keys=True)
