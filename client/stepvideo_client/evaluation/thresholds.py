"""Limits that a comparison must keep, and what it says of each."""

import argparse
import math
from dataclasses import dataclass
from typing import Final, Literal

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.comparison import FIGURES, Comparison


@dataclass(frozen=True)
class Limit:
    """An option of the command line. kind: "least" or "most" of a figure, or "change": its distance from 1."""

    option: str
    figure: str
    kind: Literal["least", "most", "change"]
    help: str
    needs: str

    @property
    def attribute(self) -> str:
        return self.option.removeprefix("--").replace("-", "_")


LIMITS: Final = (
    Limit("--min-psnr", "psnr_db", "least", "PSNR, dB", "a video of both sides"),
    Limit("--min-ssim", "ssim", "least", "SSIM", "a video of both sides"),
    Limit("--max-latent-error", "latent_error", "most", "latent error", "latents of both sides: have batch keep them"),
    Limit("--max-motion-change", "motion_ratio", "change", "distance of the motion ratio from 1", "clips that move"),
    Limit("--max-time-ratio", "seconds_ratio", "most", "seconds of denoising, B over A", "step_seconds in REPORT"),
)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """An option for each limit, and --each."""
    group = parser.add_argument_group("thresholds", "of the mean over the pairs; exit code 5 when one is not kept")
    for limit in LIMITS:
        group.add_argument(limit.option, type=float, metavar="X", help=limit.help)
    group.add_argument("--each", action="store_true", help="every pair must keep them, not the mean alone")


def check_numbers(args: argparse.Namespace) -> None:
    """Raises InvalidInput for a threshold that is no finite number."""
    for limit in LIMITS:
        value = getattr(args, limit.attribute)
        if value is not None and not math.isfinite(value):
            raise InvalidInput(f"{limit.option} must be a finite number, got {value}.")


def verdicts(found: Comparison, args: argparse.Namespace) -> list[tuple[str, bool]]:
    """A sentence for each threshold that was given, and whether it is kept. A pair that cannot be compared keeps none.
    Raises InvalidInput for a figure that no pair has."""
    asked = [(limit, getattr(args, limit.attribute)) for limit in LIMITS if getattr(args, limit.attribute) is not None]
    said = [_verdict(found, limit, bound, args.each) for limit, bound in asked]
    broken = sum(row.measures is None for row in found.rows)
    if asked and broken:
        said.append((f"every pair must be comparable, {broken} of {len(found.rows)} are not", False))
    return said


def _verdict(found: Comparison, limit: Limit, bound: float, each: bool) -> tuple[str, bool]:
    values = [getattr(one, limit.figure) for one in found.measured]
    known = [float(value) for value in values if value is not None]
    if not known or (each and len(known) < len(values)):
        raise InvalidInput(
            f"{limit.option} needs {limit.needs}, {len(values) - len(known)} of {len(values)} pairs lack them."
        )
    shown = [abs(value - 1) for value in known] if limit.kind == "change" else known
    if each:
        value, of = (min(shown) if limit.kind == "least" else max(shown)), "of the worst pair"
    else:
        mean = sum(known) / len(known)
        value, of = (abs(mean - 1) if limit.kind == "change" else mean), "in the mean"
    kept = value >= bound if limit.kind == "least" else value <= bound
    sense = "at least" if limit.kind == "least" else "at most"
    what = limit.help if limit.kind == "change" else FIGURES[limit.figure]
    return f"{what} {of} must be {sense} {bound:g}, it is {value:.4g} ({limit.option})", kept
