"""Clips -> the figures of a price file, and a table for people."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from perf.prices.measure import Clip
from stepvideo_serve.planning.prices import Estimate, Measures

RESAMPLES: Final = 2000
SPEED: Final = "speed"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, 95 % bootstrap interval of the mean (the same resamples every time), extremes."""
    array = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.percentile(array[chosen].mean(axis=1), (2.5, 97.5))
    return Estimate(float(array.mean()), float(low), float(high), float(array.min()), float(array.max()))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, equal values sharing the mean of their ranks; None when one of them is constant."""
    a, b = (_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / size) if size > 0 else None


def measures(clips: Sequence[Clip], exact: Sequence[Clip]) -> Measures:
    """Of one variant; `exact` are the same cases in the same order."""
    decoded = [clip.psnr_db for clip in clips if clip.psnr_db is not None]
    names = [name for name in clips[0].shown if name != SPEED]
    speeds = [[clip.shown[SPEED] for clip in side] for side in (clips, exact) if SPEED in clips[0].shown]
    moved = [mine / theirs for mine, theirs in zip(*speeds, strict=True) if theirs != 0] if speeds else []
    return Measures(
        clips=len(clips),
        evaluations=estimate([clip.evaluations for clip in clips]),
        guided_share=float(np.mean([clip.guided_share for clip in clips])),
        latent_error=estimate([clip.latent_error for clip in clips]),
        psnr_db=estimate(decoded) if len(decoded) == len(clips) else None,
        seconds_over_exact=estimate([a.seconds / b.seconds for a, b in zip(clips, exact, strict=True)]),
        motion=estimate(moved) if moved else None,
        motion_rank=rank_correlation(*speeds) if speeds else None,
        shares={name: float(np.mean([clip.shown[name] for clip in clips])) for name in names},
    )


def table(rows: Sequence[tuple[str, Measures]]) -> str:
    """Markdown, for docs/quality.md."""
    lines = [
        "| variant | evaluations | latent error, mean / worst | PSNR dB, mean / worst | seconds over exact | "
        "motion over exact, mean (95 %), least .. most | rank | direction | first frame dB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows:
        evaluations = f"{row.evaluations.mean:.1f} ({row.evaluations.least:.0f} .. {row.evaluations.most:.0f})"
        if row.guided_share < 1:
            evaluations += f", {row.guided_share:.0%} guided"
        psnr = "-" if row.psnr_db is None else f"{row.psnr_db.mean:.1f} / {row.psnr_db.least:.1f}"
        motion = "-"
        if row.motion is not None:
            one = row.motion
            motion = f"{one.mean:.4f} ({one.low:.4f} .. {one.high:.4f}), {one.least:.3f} .. {one.most:.3f}"
        rank = "-" if row.motion_rank is None else f"{row.motion_rank:.3f}"
        shares = [f"{row.shares[key]:.2f}" if key in row.shares else "-" for key in ("direction", "first_frame_db")]
        lines.append(
            f"| {name} | {evaluations} | {row.latent_error.mean:.1e} / {row.latent_error.most:.1e} | {psnr} | "
            f"{row.seconds_over_exact.mean:.2f} | {motion} | {rank} | {' | '.join(shares)} |"
        )
    return "\n".join(lines)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    below = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    ranks: NDArray[np.float64] = below + (equal - 1) / 2
    return ranks
