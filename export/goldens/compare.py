"""Our tensor against the golden one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

U8_LEVELS = 1
U8_SHARE = 1e-3
BF16_HALF_STEP = 2.0**-8


@dataclass(frozen=True)
class Row:
    """One comparison. `error` and `allowed` are numbers of the unit that `shown` and `shown_allowed` spell out.

    Floats: the largest difference relative to the golden's absmax. Integers: how many values differ. uint8 frames:
    the share of values that differ (as the allowance was measured), infinite when one differs by more than a level.
    """

    entry: str
    error: float
    allowed: float
    shown: str
    shown_allowed: str

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def compare(entry: str, ours: Tensor, golden: Tensor, tolerance: float) -> Row:
    """`tolerance` counts for floats only. A value that is not finite, or another shape, fails."""
    if ours.shape != golden.shape:
        return Row(entry, math.inf, 0.0, f"shape {list(ours.shape)}", f"shape {list(golden.shape)}")
    if golden.dtype == torch.uint8:
        return _compare_frames(entry, ours, golden)
    if not golden.is_floating_point():
        differing = int((ours != golden).sum())
        return Row(entry, differing, 0, f"{differing} differ", "none")
    error = relative_error(ours, golden)
    return Row(entry, error, tolerance, f"{error:.1e}", f"{tolerance:.0e}")


def relative_error(ours: Tensor, golden: Tensor) -> float:
    """max |ours - golden| / max |golden|. To a bf16 golden we compare unrounded values, and the half step by which
    rounding may have moved each of them does not count."""
    reference = golden.double()
    differences = (ours.double() - reference).abs()
    if golden.dtype == torch.bfloat16:
        differences = (differences - BF16_HALF_STEP * reference.abs()).clamp(min=0)
    if not torch.isfinite(differences).all():
        return math.inf
    largest = float(reference.abs().max()) or 1.0
    return float(differences.max()) / largest


def _compare_frames(entry: str, ours: Tensor, golden: Tensor) -> Row:
    """uint8 [F, H, W, 3]: truncation turns a tiny difference into a level now and then."""
    levels = (ours.int() - golden.int()).abs()
    largest = int(levels.max())
    share = float((levels > 0).double().mean())
    return Row(
        entry,
        share if largest <= U8_LEVELS else math.inf,
        U8_SHARE,
        f"{largest} level{'s' * (largest != 1)} on {share:.3%}",
        f"{U8_LEVELS} level on {U8_SHARE:.1%}",
    )
