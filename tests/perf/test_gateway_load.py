"""`make bench-gateway`: its gates, and a small run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf.gateway.__main__ import missed, percentile
from tests.serving.launch import exclusive, export_graphs

WELL = {"share": 0.95, "get_ms_p95": 19.9, "mib_per_100_jobs": 0.1, "flat_below": 4.0}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"share": 0.949}, "throughput"),
        ({"get_ms_p95": 20.0}, "GETs"),
        ({"mib_per_100_jobs": 4.0}, "memory"),
        ({"mib_per_100_jobs": float("nan")}, "memory"),
    ],
)
def test_each_gate_can_be_missed(change: dict[str, float], word: str) -> None:
    assert missed(WELL) == []
    [sentence] = missed({**WELL, **change})
    assert word in sentence


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(number) for number in range(200, 0, -1)]
    assert [percentile(values, share) for share in (0.005, 0.5, 0.95, 1.0)] == [1.0, 100.0, 190.0, 200.0]
    assert percentile([3.0], 0.5) == 3.0


@pytest.mark.slow
def test_a_small_run_ends_every_job(root: Path, tmp_path: Path) -> None:
    """Whether gates are met is not a test's matter."""
    build = root / "build"
    with exclusive(build / "tests.lock"):
        line = [sys.executable, "-m", "export.tiny_checkpoint", "--out", str(build / "tiny")]
        subprocess.run(line, cwd=root, check=True)
        export_graphs(root, build / "tiny", build / "onnx")
    line = [sys.executable, "-m", "perf.gateway", "--jobs", "6", "--callers", "3", "--servers", "1", "--steps", "3"]
    line += ["--step-s", "0.3", "--model-dir", str(build / "tiny"), "--engines-dir", str(build / "onnx")]
    done = subprocess.run(
        [*line, "--out", str(tmp_path / "figures.json")], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert (figures["jobs"], figures["gets"] > 6) == (6, True)
    assert max(figures["jobs_per_s_alone"]) < 1 / (3 * 0.3), "ranks slept"
