"""How fast this server is, told from what it has done, and what that means for what is still to come.

The ledger is kept by `dit_denoiser`, which sees the steps; `ti2v` and `ti2v_unary` report the stages that they time at
the end of a request, and `ti2v_quote` asks for all of it. The unit of work of each stage (WORK) is such that its
seconds grow in a straight line with it.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.dit.config import FFN_MULTIPLE, DiTConfig

WORK: Mapping[str, str] = {
    "text": "tokens of the prompts that are not in the cache",
    "image": "pixels of a frame",
    "vae_encode": "pixels of a frame",
    "prepare": "tokens of the video",
    "step": "FLOPs of a step that is evaluated",
    "forecast": "values of the latents, in a step that is forecast",
    "vae_decode": "pixels of the frames that one decoder makes",
    "check": "pixels of all frames",
    "mp4": "pixels of all frames",
}
NEWEST = 0.5  # least weight of the newest measurement in the average of its size
NEWEST_STEP = 0.2  # the same where a request has many
SIZES_KEPT = 32
DISTURBED_S = 2.0  # a step that comes so much later than it took: the ranks were started anew meanwhile
MOST_WORK = 1e20  # a step of the longest clip of the full model is 3e16 FLOPs
LONGEST_S = 86_400.0  # of a stage
SAME_SIZE = log(1.02)  # amounts of work that differ by less share an average

Arrays = Mapping[str, NDArray[Any]]
Points = list[tuple[float, float]]


class Rate:
    """Average seconds by amount of work, of one stage; amounts in between are interpolated.

    The first measurement at a size, which may include warming up, is forgotten when the second comes. Where the average
    of a size moves after that, the machine has become slower or faster (its clocks, its neighbours), and those of the
    other sizes move with it. Beyond the sizes seen, seconds are a fixed part, from a straight line fitted to all of
    them, plus a part in proportion to the work.
    """

    def __init__(self, points: Sequence[Sequence[float]] = (), newest: float = NEWEST_STEP) -> None:
        self._newest = newest
        self._averages: OrderedDict[int, tuple[float, float, int]] = OrderedDict()
        for work, seconds in points:
            self.note(work, seconds)

    def note(self, work: float, seconds: float) -> None:
        """So much work (above 0) took so long."""
        size = round(log(work) / SAME_SIZE)
        old_work, old_seconds, count = self._averages.pop(size, (work, seconds, 0))
        weight = 1.0 if count < 2 else max(1.0 / count, self._newest)
        average = (old_work + weight * (work - old_work), old_seconds + weight * (seconds - old_seconds), count + 1)
        if count >= 2 and old_seconds > 0.0:
            self._change_all(average[1] / old_seconds)
        self._averages[size] = average
        if len(self._averages) > SIZES_KEPT:
            self._averages.popitem(last=False)

    def _change_all(self, factor: float) -> None:
        for size, (work, seconds, count) in self._averages.items():
            self._averages[size] = work, min(seconds * factor, LONGEST_S), count

    def points(self) -> Points:
        """(work, seconds) by size; more work never takes less time: where it did, neighbours share their mean."""
        groups: list[list[tuple[float, float]]] = []
        for work, seconds, _ in sorted(self._averages.values()):
            groups.append([(work, seconds)])
            while len(groups) > 1 and _mean(groups[-2]) > _mean(groups[-1]):
                groups[-2:] = [groups[-2] + groups[-1]]
        return [(work, _mean(group)) for group in groups for work, _ in group]

    def seconds(self, work: float) -> float | None:
        """What so much work will take; never less for more. None before the first measurement."""
        points = self.points()
        if not points:
            return None
        if work <= points[0][0] or work >= points[-1][0]:
            end_work, end_s = points[0] if work <= points[0][0] else points[-1]
            fixed = min(_fixed_part(points), points[0][1])
            return fixed + (end_s - fixed) * work / end_work
        above = next(index for index, (known, _) in enumerate(points) if known > work)
        (low, low_s), (high, high_s) = points[above - 1 : above + 1]
        return low_s + (high_s - low_s) * (work - low) / (high - low)


class Ledger:
    """The rates of all stages; any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rates: dict[str, Rate] = {}

    def note(self, stage: str, work: float, seconds: float) -> None:
        """A stage did so much work in so long. Raises ValueError for a stage or an amount that there cannot be."""
        if stage not in WORK or not 0 < work <= MOST_WORK or not 0 <= seconds <= LONGEST_S:
            raise ValueError(f"{stage} cannot have done {work} in {seconds} s")
        with self._lock:
            newest = NEWEST_STEP if stage in ("step", "forecast") else NEWEST
            rate = self._rates.setdefault(stage, Rate(newest=newest))
            rate.note(work, seconds)

    def seconds(self, stage: str, work: float) -> float | None:
        """What so much work will take; None before the first measurement."""
        with self._lock:
            rate = self._rates.get(stage)
            return None if rate is None else rate.seconds(work)

    def points(self) -> dict[str, Points]:
        """(work, seconds) of every stage that has been measured."""
        with self._lock:
            return {stage: rate.points() for stage, rate in self._rates.items()}


class Pace:
    """The ledger of a server with this DiT, and what it says about runs. skips_branches: whether a step without
    guidance computes one branch only, which layouts of cfg2 do not."""

    def __init__(self, config: DiTConfig, skips_branches: bool = True) -> None:
        self._config, self._skips_branches = config, skips_branches
        self.ledger = Ledger()

    def note(self, tensors: Arrays, seconds: float, evaluated: bool = True, guided: bool = True) -> None:
        """A step of a run with these inputs took so long, evaluated (with its guidance or without) or forecast."""
        if evaluated:
            self.ledger.note("step", self.step_flops(tensors, guided), seconds)
        else:
            self.ledger.note("forecast", self.values(tensors), seconds)

    def step_seconds(self, tensors: Arrays) -> float | None:
        """What a step of a run with these inputs will take; None before the first step of all."""
        return self.ledger.seconds("step", self.step_flops(tensors))

    def step_flops(self, tensors: Arrays, guided: bool = True) -> float:
        """FLOPs of an evaluated step of a run with these inputs, where guidance applies if the run has a negative
        branch, or does not."""
        both = guided or not self._skips_branches
        branches = [name for name in ("positive", "negative")[: 1 + both] if f"{name}_llm" in tensors]
        texts = [sum(len(tensors[f"{name}_{kind}"]) for kind in ("llm", "clip")) for name in branches]
        return step_flops(self._config, self.tokens(tensors), texts)

    def values(self, tensors: Arrays) -> float:
        """Of the latents."""
        return float(np.prod(tensors["latents"].shape))

    def tokens(self, tensors: Arrays) -> int:
        """Tokens of the video; "latents" is [F, C, h, w]."""
        frames, _, height, width = tensors["latents"].shape
        return int(frames * height * width) // self._config.patch_size**2


class TurnPace:
    """The steps of one turn of a run, which begins now, as whoever waits for them sees them."""

    def __init__(self, pace: Pace, tensors: Arrays) -> None:
        self._pace, self._tensors = pace, tensors
        self._last_s = time.monotonic()
        self._prepared = False

    def step(self, seconds: float, evaluated: bool = True, guided: bool = True) -> None:
        """A step has come, which took the ranks so long; the time before the first one was its preparation."""
        now_s = time.monotonic()
        took_s, self._last_s = now_s - self._last_s, now_s
        undisturbed = took_s < 2.0 * seconds + DISTURBED_S
        if not self._prepared and undisturbed:
            self._pace.ledger.note("prepare", self._pace.tokens(self._tensors), max(took_s - seconds, 0.0))
        noted_s = took_s if self._prepared and undisturbed else seconds
        self._pace.note(self._tensors, noted_s, evaluated, guided)
        self._prepared = True

    def step_left_s(self) -> float | None:
        """Until the step under way will have ended; None where that is not known, as in a step that takes longer than
        was expected."""
        step_s = self._pace.step_seconds(self._tensors)
        if step_s is None:
            return None
        if not self._prepared:
            step_s += self._pace.ledger.seconds("prepare", self._pace.tokens(self._tensors)) or 0.0
        left_s = self._last_s + step_s - time.monotonic()
        return left_s if left_s >= 0.0 else None


def step_flops(config: DiTConfig, tokens: int, texts: Sequence[int]) -> float:
    """Matrix products and attentions of all blocks; `texts`: tokens of each guidance branch's text."""
    width = config.width
    linears = 2 * tokens * width**2 * (6 + 2 * FFN_MULTIPLE) * len(texts)  # qkv, out, cross q and out, feed-forward
    attention = 4 * tokens * width * (tokens * len(texts) + sum(texts))
    return float(config.num_layers * (linears + attention))


def _mean(group: Sequence[tuple[float, float]]) -> float:
    return sum(seconds for _, seconds in group) / len(group)


def _fixed_part(points: Points) -> float:
    """What work = 0 takes on the straight line with the least squares of relative errors; at least 0."""
    weights = [1.0 / max(seconds, 1e-9) ** 2 for _, seconds in points]
    total = sum(weights)
    mean_work = sum(weight * work for weight, (work, _) in zip(weights, points, strict=True)) / total
    mean_s = sum(weight * seconds for weight, (_, seconds) in zip(weights, points, strict=True)) / total
    spread = sum(weight * (work - mean_work) ** 2 for weight, (work, _) in zip(weights, points, strict=True))
    if spread <= 1e-9 * total * mean_work**2:  # one size
        return 0.0
    product = sum(w * (work - mean_work) * (s - mean_s) for w, (work, s) in zip(weights, points, strict=True))
    return max(mean_s - product / spread * mean_work, 0.0)
