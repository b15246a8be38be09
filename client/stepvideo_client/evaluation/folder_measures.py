"""The clips of a folder, measured: what `stepvideo metrics` writes as metrics.json, worst clips first."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.clip_measures import MeasuredClip, measure_clip
from stepvideo_client.evaluation.first_picture import fitted_picture, has_plain_colours
from stepvideo_client.evaluation.results import VIDEOS, Clip, read_clips
from stepvideo_client.evaluation.statistics import Estimate, deviations, estimate_known, rank_correlation
from stepvideo_client.evaluation.vbench import VBenchScores
from stepvideo_client.evaluation.video import Frame, read_frames
from stepvideo_client.evaluation.workers import in_parallel

FORMAT: Final = "stepvideo metrics"
VERSION: Final = 1
LEAST_SHARE: Final = 0.01


@dataclass(frozen=True)
class Figure:
    """A figure of clip_measures.py. bad: the side on which a clip of the set is worse, None where none is. least: what
    a deviation of the set is at least, in the figure's unit."""

    name: str
    title: str
    bad: Literal["low", "high"] | None
    least: float = 0.0


FIGURES: Final = (
    Figure("first_frame_psnr_db", "first frame against the picture, PSNR dB", "low"),
    Figure("first_frame_ssim", "first frame against the picture, SSIM", "low"),
    Figure("temporal_flickering", "temporal flickering (VBench; 1 = none)", "low"),
    Figure("motion_px", "motion, pixels a frame", None),
    Figure("motion_fastest_px", "motion of the fastest 5 %, pixels a frame", None),
    Figure("still_share", "share of still frames", "high", LEAST_SHARE),
    Figure("smoothness", "smoothness of motion (1 = even)", "low"),
    Figure("seam", "seam at chunk borders (1 = none)", "high"),
    Figure("sharpness", "sharpness, variance of the Laplacian", "low"),
    Figure("sharpness_kept", "sharpness of the last frame over the first", "low"),
    Figure("brightness", "brightness, mean level", None),
    Figure("dark_share", "share of dark pixels", "high", LEAST_SHARE),
    Figure("bright_share", "share of bright pixels", "high", LEAST_SHARE),
)


@dataclass(frozen=True)
class Entry:
    """A clip's file. `clip` is its line of results.jsonl, None in a folder of bare videos."""

    name: str
    path: Path
    clip: Clip | None = None

    @property
    def key(self) -> tuple[str, int]:
        return (self.name, 0) if self.clip is None else self.clip.key


@dataclass
class Row:
    """A measured entry. `faults`: sentences; `off`: the figure by which the clip is worst in its set, and by how many
    deviations; `vbench`: by dimension."""

    entry: Entry
    measured: MeasuredClip | None
    faults: list[str]
    off: tuple[Figure, float] | None = None
    vbench: dict[str, float] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """A figure, None where it is not known."""
        return None if self.measured is None else getattr(self.measured.measures, name)


@dataclass(frozen=True)
class FolderMeasures:
    """rows: worst clips first. summary: an estimate per figure. motion_rank: rank correlation of MOTION_SCORE with the
    motion that is seen. vbench: a score per dimension, empty without VBench. notes: what could not be told, and why."""

    folder: Path
    rows: list[Row]
    summary: dict[str, Estimate | None]
    motion_rank: float | None
    vbench: dict[str, float]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "summary": {name: None if one is None else one.as_json() for name, one in self.summary.items()},
            "motion_rank": self.motion_rank,
            "counts": counts(self.rows),
            "vbench": self.vbench,
            "notes": self.notes,
            "clips": [_row_json(row) for row in self.rows],
        }


def entries_of(folder: Path) -> list[Entry]:
    """The clips of results.jsonl, or without one every mp4 of the folder (or of its videos/). Raises InvalidInput."""
    if not folder.is_dir():
        raise InvalidInput(f"The folder of clips must exist, {str(folder)!r} does not: name what batch wrote into.")
    if clips := read_clips(folder):
        return [_entry(folder, clip) for clip in clips.values()]
    place = folder / VIDEOS if (folder / VIDEOS).is_dir() else folder
    if found := sorted(place.glob("*.mp4")):
        return [Entry(path.stem, path) for path in found]
    raise InvalidInput(
        f"{str(folder)!r} must hold results.jsonl or mp4 files, it has neither: run stepvideo batch first."
    )


def _entry(folder: Path, clip: Clip) -> Entry:
    """Raises InvalidInput for values that are not what a Clip has."""
    kinds: dict[str, Any] = {
        "id": str,
        "index": int,
        "video": str,
        "image": str,
        "prompt": str,
        "motion": int | float,
        "seed": int,
    }
    kinds |= {"preset": str, "request": Mapping, "report": Mapping, "latents": str | None}
    for name, kind in kinds.items():
        if not isinstance(getattr(clip, name), kind):
            raise InvalidInput(
                f"Every line of results.jsonl in {str(folder)!r} must be a clip, {name} of one is "
                f"{str(getattr(clip, name))[:80]!r}: remove the line, and have batch make it again."
            )
    return Entry(Path(clip.video).stem, folder / clip.video, clip)


def measure_folder(
    folder: Path,
    entries: Sequence[Entry],
    images: Path | None,
    jobs: int,
    said: Callable[[int], None],
    vbench: VBenchScores | None = None,
) -> FolderMeasures:
    """Measures every entry, `jobs` at a time, and puts the worst first.

    images: a folder with the first pictures, by their names, where they are no longer at the paths that batch noted.
    said: called with the number of clips done. What is wrong with a clip becomes a fault of its row.
    """
    rows = in_parallel(lambda entry: _measure(entry, folder, images), entries, jobs, said)
    if vbench is not None:
        for row in rows:
            of_video = {name: found.get(row.entry.path.name) for name, found in vbench.of_videos.items()}
            row.vbench = {name: value for name, value in of_video.items() if value is not None}
    scores = [None if row.entry.clip is None else row.entry.clip.motion for row in rows]
    return FolderMeasures(
        folder=folder,
        rows=_worst_first(rows),
        summary={figure.name: estimate_known([row.value(figure.name) for row in rows]) for figure in FIGURES},
        motion_rank=_motion_rank(scores, [row.value("motion_px") for row in rows]),
        vbench={} if vbench is None else dict(vbench.scores),
        notes=list(_notes(rows)),
    )


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """Of all clips, and of those that are unreadable, incomplete, black and frozen."""
    measures = [row.measured.measures for row in rows if row.measured is not None]
    return {
        "clips": len(rows),
        "unreadable": len(rows) - len(measures),
        "incomplete": sum(row.measured is not None and _missing_frames(row.entry, row.measured) != 0 for row in rows),
        "black": sum(one.black for one in measures),
        "frozen": sum(one.frozen for one in measures),
    }


def picture_path(clip: Clip, folder: Path, images: Path | None) -> Path | None:
    """Where the first picture is now, None where it is not found."""
    given = Path(clip.image)
    places = [given, folder / given] if images is None else [images / given.name, images / given]
    return next((place for place in places if place.is_file()), None)


def _measure(entry: Entry, folder: Path, images: Path | None) -> Row:
    try:
        picture = None if entry.clip is None else _picture(entry.clip, folder, images)
        measured = measure_clip(read_frames(entry.path), picture)
    except InvalidInput as error:
        return Row(entry, None, [str(error)])
    faults = []
    if missing := _missing_frames(entry, measured):
        faults.append(
            f"It has {measured.measures.frames} frames, {abs(missing)} {'too few' if missing > 0 else 'more'}."
        )
    if measured.measures.black:
        faults.append("It is black.")
    if measured.measures.frozen:
        faults.append("It is frozen: no frame differs from the first.")
    return Row(entry, measured, faults)


def _picture(clip: Clip, folder: Path, images: Path | None) -> Frame | None:
    """Fitted to the size that was asked for, None where it is not there or was shown to the model in other colours."""
    path, height, width = picture_path(clip, folder, images), _served(clip, "height"), _served(clip, "width")
    if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
        return None
    if path is None or not has_plain_colours(clip.report, path):
        return None
    return fitted_picture(path, height, width)


def _missing_frames(entry: Entry, measured: MeasuredClip) -> int:
    asked = None if entry.clip is None else _served(entry.clip, "frames", "num_frames")
    return asked - measured.measures.frames if isinstance(asked, int) else 0


def _served(clip: Clip, name: str, option: str | None = None) -> Any:
    """By REPORT, else (over a gateway, or by an older server) what was asked for."""
    return clip.report.get(name, clip.request.get(option or name))


def _worst_first(rows: list[Row]) -> list[Row]:
    """Unreadable ones, then those with faults, then by how far they are off on the bad side of a figure."""
    for figure in FIGURES:
        if figure.bad is None:
            continue
        sign = 1 if figure.bad == "high" else -1
        for row, off in zip(rows, deviations([row.value(figure.name) for row in rows], figure.least), strict=True):
            if sign * off > (0 if row.off is None else row.off[1]):
                row.off = figure, sign * off
    return sorted(
        rows, key=lambda row: (row.measured is not None, not row.faults, 0 if row.off is None else -row.off[1])
    )


def _motion_rank(scores: Sequence[float | None], seen: Sequence[float | None]) -> float | None:
    pairs = [(a, b) for a, b in zip(scores, seen, strict=True) if a is not None and b is not None]
    return rank_correlation([a for a, _ in pairs], [b for _, b in pairs]) if len(pairs) > 1 else None


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    clips = [row.entry.clip for row in rows if row.measured is not None]
    if bare := clips.count(None):
        yield f"{bare} clips have no line in results.jsonl: nothing is known of their first picture and their request."
    unknown = [row for row in rows if row.measured is not None and row.entry.clip is not None]
    unknown = [row for row in unknown if row.value("first_frame_psnr_db") is None]
    if unknown:
        yield (
            f"The first frame of {len(unknown)} clips was not compared: their picture was not found (--images FOLDER), "
            "or the server converted its colours from a profile, or perhaps did."
        )


def _row_json(row: Row) -> Mapping[str, Any]:
    clip = row.entry.clip
    return {
        "id": row.entry.key[0],
        "index": row.entry.key[1],
        "video": row.entry.path.name if clip is None else clip.video,
        "faults": row.faults,
        "worst": None if row.off is None else {"figure": row.off[0].name, "deviations": row.off[1]},
        "measures": None if row.measured is None else row.measured.measures.as_json(),
        "vbench": row.vbench,
    }
