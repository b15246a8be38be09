"""Measure the clips of a folder without any model: DIR/metrics.json and DIR/metrics.html, worst clips first.

DIR is what `stepvideo batch` wrote, or any folder of mp4 files. Exits with 1 when a clip cannot be read or lacks
frames.
"""

import argparse
import sys
from pathlib import Path
from typing import Final

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.folder_measures import FIGURES, FolderMeasures, counts, entries_of, measure_folder
from stepvideo_client.evaluation.metrics_page import estimate_text, metrics_page
from stepvideo_client.evaluation.results import VIDEOS
from stepvideo_client.evaluation.vbench import COMMAND, DIMENSIONS, run_vbench
from stepvideo_client.evaluation.workers import JOBS
from stepvideo_client.exit_codes import EXIT_OK, EXIT_SERVER_ERROR
from stepvideo_client.output import check_target, save_bytes, save_json

SHEETS: Final = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `stepvideo metrics`."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="what batch wrote, or a folder of mp4 files")
    add("--out", type=Path, metavar="FOLDER", help="where metrics.json and metrics.html go (DIR)")
    add("--images", type=Path, metavar="FOLDER", help="where the first pictures are, if no longer where batch had them")
    add("--jobs", type=int, default=JOBS, metavar="N", help=f"clips at a time ({JOBS})")
    add("--sheets", type=int, default=SHEETS, metavar="N", help=f"clips that the page shows with pictures ({SHEETS})")
    add(
        "--vbench",
        nargs="?",
        const=COMMAND,
        metavar="COMMAND",
        help=f"also run an installed VBench on the videos and merge what it finds ({COMMAND})",
    )
    add("--vbench-dimensions", nargs="+", default=DIMENSIONS, metavar="NAME", help=f"({' '.join(DIMENSIONS)})")


def run(args: argparse.Namespace) -> int:
    """Measures, writes both files and prints the summary. Raises ClientError, OSError."""
    folder, out = args.folder, args.out or args.folder
    for name, value, least in (("--jobs", args.jobs, 1), ("--sheets", args.sheets, 0)):
        if value < least:
            raise InvalidInput(f"{name} must be at least {least}, got {value}.")
    if args.images is not None and not args.images.is_dir():
        raise InvalidInput(f"--images must be a folder that exists, {str(args.images)!r} does not.")
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"--out must be a folder, {str(out)!r} is a file.")
    entries = entries_of(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.json", "metrics.html"):
        check_target(out / name, "--out")
    vbench = None
    if args.vbench is not None:
        place = folder / VIDEOS if (folder / VIDEOS).is_dir() else folder
        vbench = run_vbench(args.vbench, place.resolve(), (out / "vbench").resolve(), args.vbench_dimensions)
    found = measure_folder(folder, entries, args.images, args.jobs, lambda done: _say(done, len(entries)), vbench)
    save_json(out / "metrics.json", found.as_json())
    save_bytes(out / "metrics.html", metrics_page(found, args.sheets).encode())
    _print(found, out)
    total = counts(found.rows)
    return EXIT_SERVER_ERROR if total["unreadable"] or total["incomplete"] else EXIT_OK


def _say(done: int, of: int) -> None:
    end = "\r" if sys.stderr.isatty() and done < of else "\n"
    if end == "\r" or done == of:
        print(f"measured {done} of {of} clips", end=end, file=sys.stderr, flush=True)


def _print(found: FolderMeasures, out: Path) -> None:
    for figure in FIGURES:
        mean, interval, extremes = estimate_text(found.summary[figure.name])
        print(f"{figure.title:<45} {mean:>8}  ({interval})  {extremes}")
    for name, score in found.vbench.items():
        print(f"VBench {name:<38} {score:>8.4g}")
    for row in found.rows:
        for fault in row.faults:
            print(f"stepvideo: {row.entry.name}: {fault}", file=sys.stderr)
    print(f"{out / 'metrics.html'}: {', '.join(f'{count} {name}' for name, count in counts(found.rows).items())}")
