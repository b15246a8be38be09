"""Two folders of clips, the same requests made twice: how far B is from A, clip by clip."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.clip_measures import similarity, squared_error
from stepvideo_client.evaluation.folder_measures import Entry
from stepvideo_client.evaluation.motion import MotionMeter
from stepvideo_client.evaluation.results import Clip
from stepvideo_client.evaluation.sheets import contact_sheet, thumbnail
from stepvideo_client.evaluation.statistics import Estimate, estimate_known, psnr_db, rank_correlation
from stepvideo_client.evaluation.video import Frame, read_frames
from stepvideo_client.evaluation.workers import in_parallel

FORMAT: Final = "stepvideo comparison"
VERSION: Final = 1
SHEET_FRAMES: Final = 4  # of each side
LEAST_MOTION_PX: Final = 0.01  # a mean motion below that is none, and no other can be put over it
SAME: Final = ("prompt", "seed", "motion")
FIGURES: Final = {
    "psnr_db": "PSNR, dB (99 = equal)",
    "ssim": "SSIM",
    "latent_error": "latent error, |b - a| / |a|",
    "motion_ratio": "motion, B over A",
    "seconds_ratio": "seconds of denoising, B over A",
    "evaluations_ratio": "evaluations, B over A",
}


@dataclass(frozen=True)
class Pair:
    """One request made twice. `differs`: the options that are not the same, with both values."""

    name: str
    a: Entry
    b: Entry
    differs: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class PairMeasures:
    """B against A; None where a figure cannot be told. Figures as in FIGURES.

    motion_a_px, motion_b_px: mean motion by optical flow, pixels a frame. equal: whether all pixels are.
    """

    frames: int
    psnr_db: float
    ssim: float
    latent_error: float | None
    motion_a_px: float | None
    motion_b_px: float | None
    motion_ratio: float | None
    seconds_ratio: float | None
    evaluations_ratio: float | None
    equal: bool


@dataclass(frozen=True)
class PairRow:
    """A pair with its figures, or the fault for which it has none. Of a page: the PSNR of each frame, and
    the contact sheets of A and B (JPEG)."""

    pair: Pair
    measures: PairMeasures | None
    fault: str | None = None
    by_frame_db: tuple[float, ...] = ()
    sheets: tuple[bytes, bytes] = (b"", b"")


@dataclass(frozen=True)
class Comparison:
    """rows: the pairs that differ most first. alone: names of clips that only A, and only B, has."""

    a: Path
    b: Path
    rows: list[PairRow]
    alone: tuple[list[str], list[str]]

    @property
    def measured(self) -> list[PairMeasures]:
        return [row.measures for row in self.rows if row.measures is not None]

    @property
    def summary(self) -> dict[str, Estimate | None]:
        """An estimate per figure."""
        return {name: estimate_known([getattr(one, name) for one in self.measured]) for name in FIGURES}

    @property
    def repeated(self) -> int:
        """How many clips of B were results that a server had kept for their REQUEST_ID: they say nothing new."""
        clips = [row.pair.b.clip for row in self.rows]
        return sum(clip is not None and clip.report.get("repeated") is True for clip in clips)

    @property
    def motion_rank(self) -> float | None:
        """Rank correlation of B's motion with A's; None with fewer than two clips that move."""
        moved = [(one.motion_a_px, one.motion_b_px) for one in self.measured]
        known = [(a, b) for a, b in moved if a is not None and b is not None]
        return rank_correlation([a for a, _ in known], [b for _, b in known]) if len(known) > 1 else None

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "clips": len(self.measured),
            "equal": sum(one.equal for one in self.measured),
            "alone": {"a": self.alone[0], "b": self.alone[1]},
            "summary": {name: None if one is None else one.as_json() for name, one in self.summary.items()},
            "motion_rank": self.motion_rank,
            "pairs": [_row_json(row) for row in self.rows],
        }


def pairs_of(a: Sequence[Entry], b: Sequence[Entry]) -> tuple[list[Pair], tuple[list[str], list[str]]]:
    """The clips that both sides have, by id and index (of bare videos by their name), and the names of those that only
    one has. Raises InvalidInput without a pair, and where prompt, seed or MOTION_SCORE of one differ."""
    bare = any(entry.clip is None for entry in (*a, *b))
    of_a, of_b = ({entry.name if bare else entry.key: entry for entry in side} for side in (a, b))
    found = [
        Pair(of_a[key].name, of_a[key], of_b[key], _differences(of_a[key], of_b[key])) for key in of_a if key in of_b
    ]
    if not found:
        raise InvalidInput(
            "Both folders must hold clips of the same requests, no clip of A is in B: make both from one set."
        )
    alone = [entry.name for key, entry in of_a.items() if key not in of_b]
    return found, (alone, [entry.name for key, entry in of_b.items() if key not in of_a])


def compare_pairs(
    pairs: Sequence[Pair], folders: tuple[Path, Path], jobs: int, said: Callable[[int], None]
) -> list[PairRow]:
    """Measures every pair, `jobs` at a time; those with faults and the largest differences come first. `said` is called
    with the number of pairs done."""
    rows = in_parallel(lambda pair: _measure(pair, folders), pairs, jobs, said)
    return sorted(rows, key=lambda row: -math.inf if row.measures is None else row.measures.psnr_db)


def denoising_s(clip: Clip | None) -> float | None:
    """Seconds of a clip's steps, without waiting; None where REPORT does not tell."""
    seconds = None if clip is None else clip.report.get("step_seconds")
    if not isinstance(seconds, list) or not all(isinstance(one, int | float) for one in seconds):
        return None
    return float(sum(seconds)) if seconds else None


def evaluations(clip: Clip | None) -> int | None:
    """Of the DiT, None where REPORT does not tell."""
    quality = None if clip is None else clip.report.get("quality")
    count = quality.get("evaluations") if isinstance(quality, dict) else None
    return count if isinstance(count, int) else None


def _differences(a: Entry, b: Entry) -> dict[str, tuple[Any, Any]]:
    """Raises InvalidInput where the requests are not the same."""
    if a.clip is None or b.clip is None:
        return {}
    for name in SAME:
        mine, others = getattr(a.clip, name), getattr(b.clip, name)
        if mine != others:
            raise InvalidInput(
                f"Both folders must hold the same requests, clip {a.name!r} has {name} {str(mine)[:80]!r} in A and "
                f"{str(others)[:80]!r} in B: make both from one set with the same seeds."
            )
    first, second = _options(a.clip), _options(b.clip)
    names = sorted(first.keys() | second.keys())
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _options(clip: Clip) -> dict[str, Any]:
    """What was asked for, and what served it."""
    served = {name: clip.report.get(name) for name in ("precision", "backend", "layout", "checkpoint")}
    return {**clip.request, "quality": clip.preset, **served}


def _measure(pair: Pair, folders: tuple[Path, Path]) -> PairRow:
    try:
        return _measured(pair, folders)
    except InvalidInput as error:
        return PairRow(pair, None, str(error))


def _measured(pair: Pair, folders: tuple[Path, Path]) -> PairRow:
    squares: list[float] = []
    similar: list[float] = []
    motion = MotionMeter(), MotionMeter()
    small: tuple[list[Frame], list[Frame]] = [], []
    for frames in zip_longest(read_frames(pair.a.path), read_frames(pair.b.path)):
        first, second = frames
        if first is None or second is None or first.shape != second.shape:
            raise InvalidInput(
                f"The clips {pair.name!r} differ in their size or number of frames: they cannot be compared."
            )
        squares.append(squared_error(first, second))
        similar.append(similarity(first, second))
        for frame, meter, kept in zip(frames, motion, small, strict=True):
            meter.add(frame)
            kept.append(thumbnail(frame))
    moved = [None if (found := meter.finish()) is None else found.mean_px for meter in motion]
    measures = PairMeasures(
        frames=len(squares),
        psnr_db=psnr_db(float(np.mean(squares))),
        ssim=float(np.mean(similar)),
        latent_error=_latent_error(pair, folders),
        motion_a_px=moved[0],
        motion_b_px=moved[1],
        motion_ratio=_ratio(moved[1], moved[0], LEAST_MOTION_PX),
        seconds_ratio=_ratio(denoising_s(pair.b.clip), denoising_s(pair.a.clip)),
        evaluations_ratio=_ratio(evaluations(pair.b.clip), evaluations(pair.a.clip)),
        equal=not any(squares),
    )
    by_frame = tuple(psnr_db(square) for square in squares)
    sheets = contact_sheet(small[0], SHEET_FRAMES), contact_sheet(small[1], SHEET_FRAMES)
    return PairRow(pair, measures, None, by_frame, sheets)


def _ratio(value: float | None, over: float | None, least: float = 0.0) -> float | None:
    return None if value is None or over is None or over <= least else value / over


def _latent_error(pair: Pair, folders: tuple[Path, Path]) -> float | None:
    """None where one side has no latents. Raises InvalidInput for files that are damaged or do not fit."""
    clips = (pair.a.clip, pair.b.clip)
    paths = [folder / clip.latents for folder, clip in zip(folders, clips, strict=True) if clip and clip.latents]
    if len(paths) < 2:
        return None
    first, second = (_latents(path) for path in paths)
    if first.shape != second.shape:
        raise InvalidInput(f"The latents of {pair.name!r} must have one shape, got {first.shape} and {second.shape}.")
    size = float(np.linalg.norm(first))
    return float(np.linalg.norm(second - first)) / size if size > 0 else None


def _latents(path: Path) -> Any:
    try:
        values = np.load(path, allow_pickle=False).astype(np.float64).ravel()
    except (OSError, ValueError, AttributeError, EOFError) as error:
        raise InvalidInput(f"The latents {str(path)!r} must be a whole .npy file, got: {str(error)[:200]}.") from error
    if not np.isfinite(values).all():
        raise InvalidInput(
            f"The latents {str(path)!r} must be finite, got NaN or infinite values: make the clip again."
        )
    return values


def _row_json(row: PairRow) -> dict[str, Any]:
    return {
        "name": row.pair.name,
        "id": row.pair.a.key[0],
        "index": row.pair.a.key[1],
        "differs": {name: list(values) for name, values in row.pair.differs.items()},
        "fault": row.fault,
        "measures": None if row.measures is None else asdict(row.measures),
    }
