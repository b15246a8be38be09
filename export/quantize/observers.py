"""How large the values of a tensor get, watched over many calls.

amax is either the largest magnitude, or the magnitude that a given percentage of the values stays below. For the
latter magnitudes are counted in bins of equal ratio (32 to an octave), so that nothing need be known beforehand, counts
of several runs add up, and the answer is right to 2.2 %.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepvideo_serve.errors import ExportError

BINS_PER_OCTAVE = 32
LOWEST_EXPONENT = -64
HIGHEST_EXPONENT = 64
BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BINS_PER_OCTAVE


class AmaxObserver:
    """Largest magnitude seen, and counts of magnitudes when a percentile below 100 is asked for.

    `percentile`: 0 < p <= 100, share of all values that must lie at or below amax; 100 is the maximum.
    """

    def __init__(self, percentile: float = 100.0) -> None:
        if not 0 < percentile <= 100:
            raise ExportError(f"--percentile must be above 0 and at most 100, got {percentile:g}: correct it.")
        self.percentile = percentile
        self._largest: float | None = None
        self._counts = torch.zeros(BINS, dtype=torch.int64) if percentile < 100 else None

    def observe(self, values: Tensor) -> None:
        """Takes a tensor of any shape and floating dtype. Raises ExportError for infinities and NaN."""
        magnitudes = values.detach().abs().float()
        largest = float(magnitudes.max())
        if not math.isfinite(largest):
            raise ExportError(
                f"Activations must be finite to be calibrated, got {largest}: "
                "look for overflow in the checkpoint, or calibrate in fp32."
            )
        self._largest = max(self._largest or 0.0, largest)
        if self._counts is not None:
            positions = (magnitudes.log2().clamp_min(LOWEST_EXPONENT) - LOWEST_EXPONENT) * BINS_PER_OCTAVE
            bins = positions.floor().long().clamp(0, BINS - 1).flatten()
            self._counts += torch.bincount(bins, minlength=BINS).cpu()

    @property
    def amax(self) -> float:
        """The magnitude that the percentile asks for, never above the maximum. ExportError before the first call."""
        if self._largest is None:
            raise ExportError("An observer must have seen a tensor before it has a range, it has seen none: run first.")
        if self._counts is None:
            return self._largest
        total = int(self._counts.sum())
        needed = math.ceil(total * self.percentile / 100)
        index = int((self._counts.cumsum(0) >= needed).nonzero()[0])
        return min(self._largest, math.exp2(LOWEST_EXPONENT + (index + 1) / BINS_PER_OCTAVE))

    def to_json(self) -> dict[str, Any]:
        """What `restore` needs: the maximum, and the bins that are not empty."""
        counts = {} if self._counts is None else {str(int(i)): int(self._counts[i]) for i in self._counts.nonzero()}
        return {"largest": self._largest, "counts": counts}

    @classmethod
    def restore(cls, state: Mapping[str, Any], percentile: float) -> "AmaxObserver":
        """The observer that wrote `state`; the percentile may be another one below 100."""
        observer = cls(percentile)
        observer._largest = state["largest"]
        if observer._counts is not None:
            for index, count in state["counts"].items():
                observer._counts[int(index)] = int(count)
        return observer
