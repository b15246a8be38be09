"""Layers of the full-size networks from a checkpoint's file to engines for 544x992x102, in little memory.

Run with -s to see the figures.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from export import build_engine
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.engine.manifest import Manifest
from tests.export.full_width import write_calibration, write_full_width

GIB = 2**30
MOST_BYTES = 4 * GIB
MOST_SECONDS = 60.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def full_width(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "model"
    subprocess.run([sys.executable, "-m", "tests.engines.full_width", str(folder)], cwd=root, check=True, timeout=1200)
    write_calibration(Checkpoint(folder), folder / "calibration.json")
    return folder


@pytest.mark.parametrize(
    ("name", "precision", "fp8_gemms", "attentions"),
    [
        ("dit_block_00", "bf16", 0, 2),
        ("step_llm", "bf16", 0, 1),
        ("vae_decoder", "bf16", 0, 0),
        ("dit_block_00", "fp8", 6, 2),
        ("step_llm", "fp8", 4, 1),
    ],
)
def test_from_checkpoint_to_engines(
    full_width: Path, root: Path, tmp_path: Path, name: str, precision: str, fp8_gemms: int, attentions: int
) -> None:
    """Time is that of the processors, which does not depend on what else a machine does."""
    options = ("--calibration", full_width / "calibration.json") if precision == "fp8" else ()
    graphs = tmp_path / "onnx"
    seconds, cpu_s, peak_bytes = run_export(root, full_width, graphs, name, precision, *options)
    print(f"{name} {precision}: exported in {seconds:.0f} s ({cpu_s:.0f} of a processor), {peak_bytes / GIB:.2f} GiB")
    assert peak_bytes <= MOST_BYTES
    for sm in (89, 120):
        out = tmp_path / str(sm)
        assert build(graphs, out, sm) == 0
        extras = Manifest.load(out).graph(name).extras
        plan = extras["plan"]
        print(f"SM {sm}: built in {extras['seconds']:.0f} s, {extras['peak_bytes'] / GIB:.2f} GiB, {plan}")
        assert extras["peak_bytes"] <= MOST_BYTES
        assert extras["seconds"] <= MOST_SECONDS
        assert (plan["fp8_gemms"], plan["fused_attentions"]) == (fp8_gemms, attentions)
        if precision == "fp8":
            assert cpu_s + extras["seconds"] <= MOST_SECONDS


def test_totals_are_those_of_more_blocks(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Computed from the first of two blocks, then measured. Seconds depend on the machine's other work."""
    model, graphs, out = tmp_path / "model", tmp_path / "onnx", tmp_path / "out"
    write_full_width(model, blocks=2)
    write_calibration(Checkpoint(model), model / "calibration.json")
    run_export(root, model, graphs, "dit_block_*", "fp8", "--calibration", model / "calibration.json")
    totals = []
    for only in ("dit_block_00", "dit_block_*"):
        assert build(graphs, out, 89, "--only", only) == 0
        printed = capsys.readouterr().out
        found = re.search(
            r"dit_block, (\d) of 2: all 2 take (\S+) GiB and (\d+) s .* peak of (\S+) GiB.* share (\S+) GiB", printed
        )
        assert found is not None, printed
        totals.append(tuple(map(float, found.groups())))
    computed, measured = totals
    with capsys.disabled():
        print(f"blocks built, GiB, seconds, peak GiB, activations GiB: computed {computed}, measured {measured}")
    assert (computed[0], measured[0]) == (1, 2)
    assert computed[1] == pytest.approx(measured[1], rel=0.01)
    assert computed[3] == pytest.approx(measured[3], rel=0.1)
    assert computed[4] == measured[4]


def build(graphs: Path, out: Path, sm: int, *options: str) -> int:
    """The exit status of export.build_engine for the size of the published model."""
    arguments = ["--onnx", str(graphs), "--out", str(out), "--backend", "tensorrt_rtx", "--sm", str(sm)]
    return build_engine.main([*arguments, "--shapes", "544x992x102", "--quiet", *options])


def run_export(
    root: Path, model: Path, out: Path, only: str, precision: str, *options: object
) -> tuple[float, float, int]:
    """Seconds, those of the processors, and peak memory of export.to_onnx, without its comparison with torch."""
    given: Sequence[object] = ("--model-dir", model, "--out", out, "--only", only, "--precision", precision, *options)
    command = [sys.executable, "-m", "export.to_onnx", *map(str, given), "--no-compare", "--quiet"]
    began_s = time.monotonic()
    process = subprocess.Popen(command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.monotonic() - began_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
