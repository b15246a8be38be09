"""perf.resources on the smallest request, and the bounds that docs/load.md names."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from perf.resources.__main__ import COLUMNS, server_table, table
from perf.resources.request import PARTS, RUNS, SIZES, Meter, Taken
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.geometry import VideoGeometry

MIB = 2**20


def test_memory_is_what_is_held_and_the_peak_what_was() -> None:
    kept: list[object] = []

    def act() -> None:
        passing = np.ones(64 * MIB, np.uint8)
        kept.append(np.ones(32 * MIB, np.uint8))
        del passing

    taken = Meter().phase(act)
    assert 95 < taken.peak_mib < 110
    assert 31 < taken.held_mib < 45


@pytest.mark.parametrize("part", ["mp4", "run"])
def test_a_small_request_is_measured(root: Path, part: str) -> None:
    command = [sys.executable, "-m", "perf.resources.request", part, "small"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    taken = {phase: Taken(**values) for phase, values in json.loads(done.stdout).items()}
    expected = {
        "mp4": ["before the queue", "waiting and running", "after", "ffmpeg beside it"],
        "run": ["waiting", "running"],
    }
    assert list(taken) == expected[part]
    assert all(each.peak_mib >= each.held_mib for each in taken.values())
    if part == "run":
        assert taken["waiting"].threads == 1, "its mailbox"
        assert taken["waiting"].held_mib > 15, f"the text states of both branches alone, {RUNS} times"


def test_tables_are_markdown() -> None:
    row = ["mp4", "small", "after", 1.5, 0.5, 0.25, 0.2, 0, 0]
    assert table(COLUMNS, [row]).splitlines()[-1] == "| mp4 | small | after | 1.5 | 0.5 | 0.25 | 0.2 | 0 | 0 |"
    counts = {"ti2v": {"threads": 3.0, "files": 9.0, "MiB": 10.5}, "shared memory": {"MiB": 7.0}}
    more = {"ti2v": {"threads": 30.0, "files": 9.0, "MiB": 20.5}, "shared memory": {"MiB": 8.0}}
    *_, ti2v, shared = server_table({"idle": counts, "full": more, "after": counts}).splitlines()
    assert ti2v == "| ti2v | 3 / 30 / 3 | 9 / 9 / 9 | 10.5 / 20.5 / 10.5 |"
    assert shared == "| shared memory |  |  | 7 / 8 / 7 |"


def test_the_worst_request_is_one_that_the_limits_allow(root: Path) -> None:
    limits = ServeConfig.load(root / "serve.toml").limits
    assert VideoGeometry(*SIZES["worst allowed"]).tokens == limits.max_tokens
    assert set(PARTS) == {"mp4", "frames", "run"}


def test_every_bound_that_the_ledger_names_exists(root: Path) -> None:
    text = (root / "docs" / "load.md").read_text(encoding="utf-8")
    found = re.search(r"^## What a request takes\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    keys = re.findall(r"`\[(\w+)\] (\w+)`", found[1])
    constants = re.findall(r"`([A-Z][A-Z_]+)` \(([\w/]+\.py)\)", found[1])
    assert len(keys) >= 5
    assert len(constants) >= 3
    tables = tomllib.loads((root / "serve.toml").read_text(encoding="utf-8"))
    for section, key in keys:
        assert key in tables[section], f"[{section}] {key}"
    for name, path in constants:
        source = (root / "stepvideo_serve" / path).read_text(encoding="utf-8")
        assert re.search(rf"^{name}\b", source, re.MULTILINE), f"{name} in {path}"
