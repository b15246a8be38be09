"""Full width on a small machine: one block at a time, in bounded memory."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.engine.manifest import Manifest
from tests.export.full_width import write_calibration, write_full_width

GIB = 2**30
ALLOWED_BYTES = 4 * GIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full-width")
    write_full_width(folder)
    write_calibration(Checkpoint(folder), folder / "calibration.json")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graph", "linears", "attentions", "least_bytes"),
    [("dit_block_00", 6, 1, 528_000_000), ("step_llm", 4, 0, 400_000_000)],
)
def test_a_block_goes_from_its_shard_to_an_fp8_graph_in_4_gib(
    graph: str, linears: int, attentions: int, least_bytes: int, model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "export.to_onnx", "--model-dir", str(model), "--out", str(tmp_path), "--quiet"]
    options = ["--precision", "fp8", "--calibration", str(model / "calibration.json"), "--no-compare", "--only", graph]
    child = subprocess.Popen([*command, *options])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    assert usage.ru_maxrss * 1024 < ALLOWED_BYTES
    entry = Manifest.load(tmp_path).graphs[graph]
    assert entry.extras["fp8"] == {"linears": linears, "attentions": attentions}
    assert least_bytes < sum(file.size_bytes for file in entry.files) < 1.02 * least_bytes
    shutil.rmtree(tmp_path)
