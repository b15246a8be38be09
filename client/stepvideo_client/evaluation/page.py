"""The parts of a page that needs nothing else: text, tables, plots as inline SVG, pictures as data in the page.

Whatever comes from outside (prompts, names, errors) is escaped here; functions take text and give HTML.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

import numpy as np

BINS: Final = 24
PLOT_WIDTH: Final = 300
PLOT_HEIGHT: Final = 60

_STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; --faint: #888; --mark: #b3261e; --ink: #2a6db0; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 74rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
article { border-top: 1px solid var(--line); padding: 1rem 0; }
article h3 { font-size: 1rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
.prompt, .note { color: var(--faint); overflow-wrap: anywhere; } .fault { color: var(--mark); font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: 1.2rem; margin: .6rem 0; }
figure { margin: 0; } figcaption { color: var(--faint); font-size: .85rem; }
img, video { max-width: 100%; height: auto; display: block; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; } .pair video { width: 100%; background: #000; }
svg { display: block; overflow: visible; } svg text { font-size: 10px; fill: var(--faint); }
.bar, .curve { fill: var(--ink); } .curve { fill: none; stroke: var(--ink); stroke-width: 1.3; }
.axis { stroke: var(--line); } .border { stroke: var(--mark); stroke-dasharray: 2 3; opacity: .7; }
"""


def document(title: str, body: Iterable[str], script: str = "") -> str:
    """A whole page. `body` is HTML; `script` is JavaScript of ours, without any text from outside."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    end = f"<script>{script}</script>" if script else ""
    content = "\n".join(body)
    whole = f'<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{content}\n{end}</body></html>'
    return f"<!doctype html>\n{whole}\n"


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """kind: a class of the style sheet: prompt, note or fault."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of text; the first column is aligned to the left."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def plots(figures: Iterable[str]) -> str:
    """Figures side by side."""
    return f'<div class="plots">{"".join(figures)}</div>'


def figure(content: str, caption: str) -> str:
    """HTML with a line of text below."""
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def histogram(values: Sequence[float]) -> str:
    """How often which value comes; at least one value."""
    counts, _ = np.histogram(np.asarray(values, dtype=np.float64), bins=BINS)
    most, wide = max(int(counts.max()), 1), PLOT_WIDTH / BINS
    bars = [
        f'<rect class="bar" x="{index * wide:.1f}" y="{PLOT_HEIGHT * (1 - count / most):.1f}" '
        f'width="{wide - 1:.1f}" height="{PLOT_HEIGHT * count / most:.1f}"/>'
        for index, count in enumerate(counts)
        if count
    ]
    return _svg(bars, number(min(values)), number(max(values)))


def curve(values: Sequence[float], borders: Sequence[int] = ()) -> str:
    """Values in order, from 0 up; `borders`: the places (from 0) that are marked."""
    if not values:
        return ""
    top = max(max(values), 1e-9)
    step = PLOT_WIDTH / max(len(values) - 1, 1)
    points = " ".join(f"{i * step:.1f},{PLOT_HEIGHT * (1 - max(v, 0) / top):.1f}" for i, v in enumerate(values))
    marks = [
        f'<line class="border" x1="{place * step:.1f}" x2="{place * step:.1f}" y1="0" y2="{PLOT_HEIGHT}"/>'
        for place in borders
    ]
    return _svg([*marks, f'<polyline class="curve" points="{points}"/>'], "0", f"up to {number(max(values))}")


def picture(jpeg: bytes, caption: str) -> str:
    """A JPEG within the page; caption: what it shows, for those who cannot see it."""
    return f'<img alt="{escape(caption)}" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def _svg(shapes: Iterable[str], left: str, right: str) -> str:
    """A plot above its axis, with a text at each end of it."""
    axis = f'<line class="axis" x1="0" x2="{PLOT_WIDTH}" y1="{PLOT_HEIGHT}" y2="{PLOT_HEIGHT}"/>'
    below = PLOT_HEIGHT + 13
    texts = (
        f'<text x="0" y="{below}">{escape(left)}</text>'
        f'<text x="{PLOT_WIDTH}" y="{below}" text-anchor="end">{escape(right)}</text>'
    )
    size = f'width="{PLOT_WIDTH}" height="{below + 3}" viewBox="0 0 {PLOT_WIDTH} {below + 3}"'
    return f'<svg {size} role="img">{"".join(shapes)}{axis}{texts}</svg>'
