"""VBench, as a program that is installed somewhere: called for each dimension, its results read and merged.

VBench needs a GPU and weights of other models, so it is no dependency. It writes NAME_eval_results.json, an object
{dimension: [score, ..., [{"video_path": ..., "video_results": ...}, ...]]}, in the folder of --output_path.
"""

import json
import math
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from stepvideo_client.errors import InvalidInput

COMMAND: Final = "vbench evaluate --mode=custom_input"
DIMENSIONS: Final = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
RESULTS: Final = "*_eval_results.json"


@dataclass(frozen=True)
class VBenchScores:
    """`scores`: by dimension; `of_videos`: by dimension, then by the file's name. What VBench says as true or false
    is 1 or 0."""

    scores: dict[str, float] = field(default_factory=dict)
    of_videos: dict[str, dict[str, float]] = field(default_factory=dict)


def run_vbench(command: str, videos: Path, folder: Path, dimensions: Sequence[str]) -> VBenchScores:
    """Calls `command` with --videos_path, --dimension and --output_path, once for each dimension.

    command: a program and the arguments that it needs besides, as in a shell, without one. folder: where the results
    go, a folder for each dimension; those of an earlier call are replaced. What the program prints is shown.
    Raises InvalidInput, in one sentence, where it cannot be started, fails, or leaves no result that can be read.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InvalidInput(f"--vbench must be a command, got {command!r} ({error}): close its quotes.") from error
    if not words:
        raise InvalidInput(f"--vbench must be a command such as {COMMAND!r}, got nothing.")
    found = VBenchScores()
    for dimension in dimensions:
        target = folder / dimension
        target.mkdir(parents=True, exist_ok=True)
        for old in target.glob(RESULTS):
            old.unlink()
        _call([*words, "--videos_path", str(videos), "--dimension", dimension, "--output_path", str(target)])
        _read(target, dimension, found)
    return found


def _call(words: Sequence[str]) -> None:
    try:
        code = subprocess.run(words, stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        raise InvalidInput(
            f"--vbench must name a program that can be started, {words[0]!r} cannot ({error.strerror}): install "
            "VBench, or give the command that starts it."
        ) from error
    if code != 0:
        raise InvalidInput(f"VBench must end with code 0, got {code}: see what it printed.")


def _read(folder: Path, dimension: str, found: VBenchScores) -> None:
    """Adds what the newest file of results says."""
    files = sorted(folder.glob(RESULTS), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        raise InvalidInput(f"VBench must leave {RESULTS} in {str(folder)!r}, there is none: see what it printed.")
    try:
        values = json.loads(files[-1].read_text(encoding="utf-8"))
        score, of_videos = values[dimension][0], values[dimension][-1]
        found.scores[dimension] = _number(score)
        found.of_videos[dimension] = {Path(one["video_path"]).name: _number(one["video_results"]) for one in of_videos}
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise InvalidInput(
            f"{str(files[-1])!r} must hold [score, ..., [results of videos]] of {dimension}, it cannot be read "
            f"({type(error).__name__}: {error}): is this another release of VBench?"
        ) from error


def _number(value: Any) -> float:
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)
