"""The page of `stepvideo metrics`: summary, plots, and the clips with their contact sheets, worst first."""

from collections.abc import Iterator
from typing import Final

from stepvideo_client.evaluation import page
from stepvideo_client.evaluation.clip_measures import CHUNK_FRAMES
from stepvideo_client.evaluation.folder_measures import FIGURES, FolderMeasures, Row, counts
from stepvideo_client.evaluation.statistics import Estimate

PROMPT_SHOWN: Final = 300  # characters


def metrics_page(found: FolderMeasures, sheets: int) -> str:
    """HTML; `sheets`: how many clips are shown with pictures."""
    return page.document(f"Metrics of {found.folder.name}", _parts(found, sheets))


def estimate_text(one: Estimate | None) -> tuple[str, str, str]:
    """Mean, interval and extremes."""
    if one is None:
        return "-", "-", "-"
    shown = [page.number(value, 4) for value in (one.mean, one.low, one.high, one.least, one.most)]
    return shown[0], f"{shown[1]} .. {shown[2]}", f"{shown[3]} .. {shown[4]}"


def _parts(found: FolderMeasures, sheets: int) -> Iterator[str]:
    yield page.heading(f"Metrics of {found.folder.name}", 1)
    yield page.paragraph(", ".join(f"{count} {name}" for name, count in counts(found.rows).items()))
    for note in found.notes:
        yield page.paragraph(note, "note")
    yield page.heading("Summary")
    lines = [(figure.title, *estimate_text(found.summary[figure.name])) for figure in FIGURES]
    yield page.table(("figure", "mean", "95 % of the mean", "least .. most"), lines)
    if found.motion_rank is not None:
        yield page.paragraph(f"Rank correlation of MOTION_SCORE with the motion seen: {found.motion_rank:.3f}")
    if found.vbench:
        yield page.heading("VBench")
        yield page.table(("dimension", "score"), [(name, page.number(one, 4)) for name, one in found.vbench.items()])
    yield page.heading("How the clips are spread")
    spreads = [(figure, [row.value(figure.name) for row in found.rows]) for figure in FIGURES]
    known = [(figure, [value for value in values if value is not None]) for figure, values in spreads]
    yield page.plots(page.figure(page.histogram(values), figure.title) for figure, values in known if values)
    shown = min(sheets, len(found.rows))
    yield page.heading(f"Worst clips first, {shown} of {len(found.rows)}")
    for row in found.rows[:shown]:
        yield _clip(row)
    yield page.heading("All clips, worst first")
    yield page.table(("clip", *(figure.title for figure in FIGURES)), [_line(row) for row in found.rows])


def _clip(row: Row) -> str:
    parts = [page.heading(row.entry.name, 3)]
    if row.entry.clip is not None:
        about = f"seed {row.entry.clip.seed}, motion {row.entry.clip.motion:g}, {row.entry.clip.preset}"
        parts.append(page.paragraph(f"{row.entry.clip.prompt[:PROMPT_SHOWN]} ({about})", "prompt"))
    parts += [page.paragraph(fault, "fault") for fault in row.faults]
    if row.off is not None:
        figure, off = row.off
        value = page.number(row.value(figure.name))
        parts.append(
            page.paragraph(f"Farthest off: {figure.title}: {value}, {off:.1f} deviations from the set's median.")
        )
    if row.measured is not None:
        parts.append(page.picture(row.measured.sheet, f"frames of {row.entry.name}"))
        places = [index - 1 for index in range(CHUNK_FRAMES, len(row.measured.changes) + 1, CHUNK_FRAMES)]
        changes = page.curve(row.measured.changes, places)
        curves = [page.figure(changes, "change from frame to frame, levels; dashed: borders of chunks")]
        curves.append(page.figure(page.curve(row.measured.motion_px, places), "motion, pixels a frame"))
        parts.append(page.plots(curves))
    return f"<article>{''.join(parts)}</article>"


def _line(row: Row) -> tuple[str, ...]:
    marks = "".join(f" [{fault}]" for fault in row.faults)
    return (f"{row.entry.name}{marks}", *(page.number(row.value(figure.name)) for figure in FIGURES))
