"""Figures over clips: estimates with their intervals, ranks, and how far a clip is off."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

RESAMPLES: Final = 2000
INTERVAL_PERCENT: Final = (2.5, 97.5)
EQUAL_DB: Final = 99.0
"""What stands for the infinite PSNR of equal frames."""
# From absolute deviations to the deviation of a normal distribution.
_FROM_MEDIAN: Final = 1.4826
_FROM_MEAN: Final = 1.2533


@dataclass(frozen=True)
class Estimate:
    """Over clips: the mean, its 95 % bootstrap interval (low, high), and the extremes of single clips."""

    mean: float
    low: float
    high: float
    least: float
    most: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def estimate(values: Sequence[float]) -> Estimate:
    """Of at least one value; the same values give the same interval every time."""
    array = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.percentile(array[chosen].mean(axis=1), INTERVAL_PERCENT)
    return Estimate(float(array.mean()), float(low), float(high), float(array.min()), float(array.max()))


def estimate_known(values: Sequence[float | None]) -> Estimate | None:
    """Of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return estimate(known) if known else None


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, equal values sharing the mean of their ranks; None when one of them is constant."""
    a, b = (_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / size) if size > 0 else None


def psnr_db(squared_error: float) -> float:
    """Of a mean squared error of levels 0 .. 255, at most EQUAL_DB."""
    return EQUAL_DB if squared_error == 0 else min(EQUAL_DB, 10 * math.log10(255**2 / squared_error))


def deviations(values: Sequence[float | None], least: float = 0.0) -> list[float]:
    """How many deviations each value lies above the median of the set (below: negative); 0 for what is not known.

    A deviation is told by the median of absolute deviations; where that is 0, by their mean. It is at least `least`: a
    share that is next to nothing in most clips would lie thousands of deviations off in the others.
    """
    known = np.asarray([value for value in values if value is not None], dtype=np.float64)
    if known.size == 0:
        return [0.0] * len(values)
    middle = float(np.median(known))
    away = np.abs(known - middle)
    spread = _FROM_MEDIAN * float(np.median(away)) or _FROM_MEAN * float(away.mean())
    spread = max(spread, least)
    return [0.0 if value is None or spread == 0 else (value - middle) / spread for value in values]


def means(rows: Sequence[Mapping[str, float | None]], names: Sequence[str]) -> dict[str, Estimate | None]:
    """The estimate of each name over the rows in which it is known."""
    return {name: estimate_known([row.get(name) for row in rows]) for name in names}


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    below = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    ranks: NDArray[np.float64] = below + (equal - 1) / 2
    return ranks
