"""Folders of clips: killing who makes them, and whether two are the same."""

import json
import random
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepvideo_client.evaluation.results import read_clips

PATIENCE_S = 600
DIFFERS = ("report", "server", "seconds")  # of one and the same clip, from run to run


def contents(out: Path, ids: str = "") -> dict[str, Any]:
    """Every file's bytes, and of results.jsonl, whose order is that of finishing, the clips by what decides them; of
    the entries whose id begins with `ids` only."""
    files: dict[str, Any] = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    lines = files.pop("results.jsonl").decode().splitlines()
    clips = read_clips(out)
    assert len(lines) == len(clips), "a clip was made twice"
    others = [clip for clip in clips.values() if not clip.id.startswith(ids)]
    for clip in others:
        del clips[clip.key], files[clip.video]
    files["clips"] = {
        key: {name: value for name, value in asdict(clip).items() if name not in DIFFERS} for key, clip in clips.items()
    }
    files["batch.json"] = json.loads(files["batch.json"])
    return files


def run_with_kills(
    start: Callable[..., "subprocess.Popen[str]"],
    command: Sequence[object],
    moments: random.Random,
    kills: int,
    longest_s: float,
) -> int:
    """Runs the command to its end, after `kills` runs that were ended by SIGKILL after a random time each. Returns how
    many of them were still at work then."""
    met = 0
    for _ in range(kills):
        process = start(*command)
        try:
            process.communicate(timeout=moments.uniform(0.5, longest_s))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            met += 1
    process = start(*command)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    return met
