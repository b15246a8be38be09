"""What perf_analyzer measured, as one table and one picture.

    python -m perf.analyzer.report FOLDER    # reads FOLDER/*.export.json, writes report.json, report.md and report.png

An export is named MODEL.LOAD.VALUE.export.json, such as ti2v.concurrency.2.export.json. A request's end is the response
with the result; its waiting share is what is left of its end-to-end time when the seconds in which a stage or a
denoising step worked for it (the result's REPORT) are taken away: the queue for the ranks, their preparation, and
transport. A stage's seconds include what it waits for requests that are in the same stage.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from stepvideo_serve.errors import SetupError

NAME = re.compile(r"(?P<model>\w+)\.(?P<load>concurrency|rate)\.(?P<value>[\d.]+)\.export\.json")
BESIDE_STAGES = ("total", "denoise", "queue")  # entries of REPORT's seconds that hold waiting too
WIDTH_PX, ROW_PX, LEFT_PX, RIGHT_PX, TOP_PX = 900, 34, 190, 120, 56
INK, GREY, BLUE, PALE = (20, 20, 20), (200, 200, 200), (50, 80, 225), (170, 185, 245)


@dataclass(frozen=True)
class Sample:
    """One request. Seconds: when it was sent, until its first response, until its result, of work for it."""

    sent_s: float
    first_s: float
    end_to_end_s: float
    working_s: float


@dataclass(frozen=True)
class Row:
    """One model under one load: `load` is "concurrency" (requests in flight) or "rate" (requests a second).

    Seconds, except `requests` (how many), `per_s` (finished requests a second) and `waiting` (share, 0 to 1).
    """

    model: str
    load: str
    value: float
    requests: int
    first_p50_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    per_s: float
    waiting: float


def read_export(path: Path) -> list[Sample]:
    """The finished requests of an export. Raises SetupError for a file that is none, or has none.

    The file has the bytes of pictures and videos between its quotation marks, so it is not UTF-8, and its texts have
    control characters (strict=False); numbers of outputs that a response lacks are whatever was in memory. REPORT
    is text, and only the result has it.
    """
    try:
        experiments = json.loads(path.read_bytes().decode("latin-1"), strict=False)["experiments"]
        requests = [request for experiment in experiments for request in experiment["requests"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SetupError(f"{path} must be an export of perf_analyzer, but cannot be read as one: {error}.") from None
    samples = [sample for request in requests if (sample := _sample(request)) is not None]
    if not samples:
        raise SetupError(f"{path} must have finished requests, but has none: measure longer.")
    return samples


def _sample(request: dict[str, Any]) -> Sample | None:
    """None for a request that was cut off at the end of the measurement."""
    times_ns = request["response_timestamps"]
    for time_ns, outputs in zip(times_ns, request["response_outputs"], strict=True):
        if outputs.get("REPORT"):
            report = json.loads(outputs["REPORT"])
            stages = sum(value for name, value in report["seconds"].items() if name not in BESIDE_STAGES)
            sent_ns = request["timestamp"]
            return Sample(
                sent_ns * 1e-9,
                (times_ns[0] - sent_ns) * 1e-9,
                (time_ns - sent_ns) * 1e-9,
                stages + sum(report["step_seconds"]),
            )
    return None


def summarize(model: str, load: str, value: float, samples: Sequence[Sample]) -> Row:
    """The row of one load: percentiles over its requests, throughput from the first request to the last result."""
    ends_s = np.array([sample.end_to_end_s for sample in samples])
    finished_s = np.array([sample.sent_s for sample in samples]) + ends_s
    p50, p95, p99 = (float(value) for value in np.percentile(ends_s, [50, 95, 99]))
    return Row(
        model=model,
        load=load,
        value=value,
        requests=len(samples),
        first_p50_s=float(np.percentile([sample.first_s for sample in samples], 50)),
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        per_s=len(samples) / float(finished_s.max() - min(sample.sent_s for sample in samples)),
        waiting=1.0 - sum(sample.working_s for sample in samples) / float(ends_s.sum()),
    )


def read_folder(folder: Path) -> list[Row]:
    """A row per export in the folder, by model, load and value. Raises SetupError when there is none."""
    rows = []
    for path in folder.glob("*.export.json"):
        found = NAME.fullmatch(path.name)
        if found is None:
            raise SetupError(f"Exports must be called MODEL.LOAD.VALUE.export.json, found {path}: rename or remove it.")
        rows.append(summarize(found["model"], found["load"], float(found["value"]), read_export(path)))
    if not rows:
        raise SetupError(f"{folder} must have exports of perf_analyzer, found none: run python -m perf.analyzer.")
    return sorted(rows, key=lambda row: (row.model, row.load, row.value))


def table(rows: Iterable[Row]) -> str:
    """Markdown."""
    lines = [
        "| model | load | requests | first response, p50 | end to end, p50 | p95 | p99 | a minute | waiting |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds = [f"{value:.2f} s" for value in (row.first_p50_s, row.p50_s, row.p95_s, row.p99_s)]
        cells = [row.model, load_text(row), str(row.requests), *seconds, f"{60 * row.per_s:.1f}", f"{row.waiting:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def load_text(row: Row) -> str:
    return f"{row.value:g} in flight" if row.load == "concurrency" else f"{row.value:g} a second"


def picture(rows: Sequence[Row]) -> Image.Image:
    """A bar per row: p50 full, up to p99 pale, with lines at the first response and at p95; throughput at the right."""
    image = Image.new("RGB", (WIDTH_PX, TOP_PX + ROW_PX * len(rows) + 30), "white")
    draw = ImageDraw.Draw(image)
    longest_s = max(row.p99_s for row in rows)

    def place(seconds: float) -> float:
        return LEFT_PX + seconds / longest_s * (WIDTH_PX - LEFT_PX - RIGHT_PX)

    draw.text((8, 8), "end to end: dark to p50, pale to p99, line at p95; thin line: first response (p50)", fill=INK)
    draw.text((WIDTH_PX - RIGHT_PX + 10, 30), "a minute", fill=INK)
    bottom = TOP_PX + ROW_PX * len(rows)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = place(share * longest_s)
        draw.line([(x, TOP_PX - 6), (x, bottom)], fill=GREY)
        draw.text((x, bottom + 6), f"{share * longest_s:.3g} s", fill=INK, anchor="ma")
    for index, row in enumerate(rows):
        top = TOP_PX + index * ROW_PX
        draw.text((8, top + 6), f"{row.model}, {load_text(row)}", fill=INK)
        draw.rectangle([place(0), top, place(row.p99_s), top + ROW_PX - 12], fill=PALE)
        draw.rectangle([place(0), top, place(row.p50_s), top + ROW_PX - 12], fill=BLUE)
        draw.line([(place(row.p95_s), top - 3), (place(row.p95_s), top + ROW_PX - 9)], fill=INK, width=2)
        draw.line([(place(row.first_p50_s), top - 3), (place(row.first_p50_s), top + ROW_PX - 9)], fill=INK)
        draw.text((WIDTH_PX - RIGHT_PX + 10, top + 6), f"{60 * row.per_s:.1f}", fill=INK)
    return image


def write_report(folder: Path) -> str:
    """Writes report.json, report.md and report.png into the folder; returns the table. Raises as read_folder does."""
    rows = read_folder(folder)
    text = table(rows)
    (folder / "report.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(text, encoding="utf-8")
    picture(rows).save(folder / "report.png")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.analyzer.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with the exports; the report is written there too")
    folder: Path = parser.parse_args(argv).folder
    try:
        print(write_report(folder), end="")
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {folder}/report.md, report.json and report.png", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
