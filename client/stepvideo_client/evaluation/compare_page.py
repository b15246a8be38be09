"""The page of `stepvideo compare`: the summary, and pairs side by side, those that differ most first.

Videos are linked relative to the page, and play together; contact sheets are in the page itself.
"""

import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from stepvideo_client.evaluation import page
from stepvideo_client.evaluation.comparison import FIGURES, Comparison, PairRow
from stepvideo_client.evaluation.metrics_page import PROMPT_SHOWN, estimate_text

REPEATED: Final = "{} clips of B were not made anew: the server had kept the results of the same requests."
# A button plays both videos of its pair from the beginning.
_SCRIPT: Final = """
for (const button of document.querySelectorAll("button")) {
  button.onclick = () => {
    for (const video of button.closest("article").querySelectorAll("video")) { video.currentTime = 0; video.play(); }
  };
}
"""


def compare_page(found: Comparison, folder: Path, shown: int, verdicts: Sequence[tuple[str, bool]]) -> str:
    """HTML of a page in `folder`. shown: how many pairs have pictures; verdicts: thresholds, and which are kept."""
    return page.document("Comparison", _parts(found, folder, shown, verdicts), _SCRIPT)


def _parts(found: Comparison, folder: Path, shown: int, verdicts: Sequence[tuple[str, bool]]) -> Iterator[str]:
    yield page.heading("Comparison", 1)
    yield page.paragraph(f"A: {found.a.name}. B: {found.b.name}. {len(found.measured)} pairs were compared.")
    yield page.paragraph(f"{sum(one.equal for one in found.measured)} of them are equal in every pixel.")
    for side, names in zip("AB", found.alone, strict=True):
        if names:
            yield page.paragraph(f"Only {side} has {len(names)} clips: {', '.join(names[:5])}", "note")
    if found.repeated:
        yield page.paragraph(REPEATED.format(found.repeated), "note")
    for text, kept in verdicts:
        yield page.paragraph(f"{'Kept' if kept else 'Not kept'}: {text}", "" if kept else "fault")
    if different := _difference_rows(found):
        yield page.heading("What differs")
        yield page.table(("option", "A", "B"), different)
    yield page.heading("Summary")
    lines = [(title, *estimate_text(found.summary[name])) for name, title in FIGURES.items()]
    yield page.table(("figure", "mean", "95 % of the mean", "least .. most"), lines)
    if found.motion_rank is not None:
        yield page.paragraph(f"Rank correlation of B's motion with A's: {found.motion_rank:.3f}")
    values = {name: [getattr(one, name) for one in found.measured] for name in FIGURES}
    known = {name: [value for value in of_pairs if value is not None] for name, of_pairs in values.items()}
    yield page.plots(page.figure(page.histogram(of), FIGURES[name]) for name, of in known.items() if of)
    count = min(shown, len(found.rows))
    yield page.heading(f"Pairs that differ most first, {count} of {len(found.rows)}")
    for row in found.rows[:count]:
        yield _pair(row, folder)
    yield page.heading("All pairs")
    yield page.table(("pair", *FIGURES.values()), [_line(row) for row in found.rows])


def _difference_rows(found: Comparison) -> list[tuple[str, str, str]]:
    """The options in which any pair differs, each with the values of the first such pair."""
    rows: dict[str, tuple[Any, Any]] = {}
    for row in found.rows:
        for name, values in row.pair.differs.items():
            rows.setdefault(name, values)
    return [(name, str(a), str(b)) for name, (a, b) in rows.items()]


def _pair(row: PairRow, folder: Path) -> str:
    parts = [page.heading(row.pair.name, 3)]
    if row.pair.a.clip is not None:
        parts.append(page.paragraph(row.pair.a.clip.prompt[:PROMPT_SHOWN], "prompt"))
    if row.fault is not None:
        parts.append(page.paragraph(row.fault, "fault"))
    if row.measures is not None:
        texts = [f"{FIGURES[name]}: {page.number(getattr(row.measures, name))}" for name in FIGURES]
        parts.append(page.paragraph(" · ".join(texts)))
        paths = row.pair.a.path, row.pair.b.path
        sides = [_side(*side, folder) for side in zip("AB", paths, row.sheets, strict=True)]
        parts.append(f'<div class="pair">{"".join(sides)}</div><p><button type="button">play both</button></p>')
        parts.append(page.plots([page.figure(page.curve(row.by_frame_db), "PSNR of each frame, dB")]))
    return f"<article>{''.join(parts)}</article>"


def _side(side: str, video: Path, sheet: bytes, folder: Path) -> str:
    """The video itself, by a link relative to the page, over a few of its frames."""
    link = quote(os.path.relpath(video.resolve(), folder.resolve()))
    player = f'<video src="{escape(link)}" controls muted loop preload="metadata"></video>'
    return page.figure(player + page.picture(sheet, f"frames of {side}"), f"{side}: {video.name}")


def _line(row: PairRow) -> tuple[str, ...]:
    mark = f" [{row.fault}]" if row.fault is not None else ""
    figures = [None if row.measures is None else getattr(row.measures, name) for name in FIGURES]
    return (f"{row.pair.name}{mark}", *(page.number(value) for value in figures))
