"""Layers of the full-size networks from a checkpoint's file to engines for 544x992x102, in little memory.

Run with -s to see the figures.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export import build_engine
from stepvideo_serve.engine.manifest import Manifest

GIB = 2**30
MOST_BYTES = 4 * GIB
MOST_SECONDS = 60.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def full_width(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "model"
    subprocess.run([sys.executable, "-m", "tests.engines.full_width", str(folder)], cwd=root, check=True, timeout=1200)
    return folder


@pytest.mark.parametrize("name", ["dit_block_00", "step_llm", "vae_decoder"])
def test_from_checkpoint_to_engines(full_width: Path, root: Path, tmp_path: Path, name: str) -> None:
    graphs = tmp_path / "onnx"
    seconds, peak_bytes = run_export(root, "--model-dir", full_width, "--out", graphs, "--only", name)
    print(f"{name}: exported in {seconds:.0f} s, {peak_bytes / GIB:.2f} GiB")
    assert peak_bytes <= MOST_BYTES
    for sm in (89, 120):
        out = tmp_path / str(sm)
        arguments = ["--onnx", str(graphs), "--out", str(out), "--backend", "tensorrt_rtx", "--sm", str(sm)]
        assert build_engine.main([*arguments, "--shapes", "544x992x102", "--quiet"]) == 0
        extras = Manifest.load(out).graph(name).extras
        assert extras["peak_bytes"] <= MOST_BYTES
        assert extras["seconds"] <= MOST_SECONDS


def run_export(root: Path, *arguments: object) -> tuple[float, int]:
    """Seconds and peak memory of python -m export.to_onnx in bf16, without its comparison with torch."""
    command = [sys.executable, "-m", "export.to_onnx", *map(str, arguments), "--precision", "bf16", "--no-compare"]
    began_s = time.monotonic()
    process = subprocess.Popen([*command, "--quiet"], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.monotonic() - began_s, usage.ru_maxrss * 1024
