"""A whole trained checkpoint to engines, in both precisions and for two architectures."""

import json
from pathlib import Path

import pytest

from export.parity import main as parity
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.engine.target import require_parity
from tests.engines.conftest import Run
from toyworld import fp8_graphs
from toyworld.evaluate import CHECKPOINT

SIZES = ("--num-frames", "34", "--height", "64", "--width", "64")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """calibration.json of the checkpoint, and sensitivity.json, which says what to keep in bf16."""
    folder = tmp_path_factory.mktemp("measured")
    assert fp8_graphs.measure(CHECKPOINT, folder, budget=1.4) == 0
    return folder


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_all_graphs_of_a_trained_checkpoint(tool: Run, measured: Path, tmp_path: Path, precision: str) -> None:
    onnx, options = tmp_path / "onnx", ["--precision", precision]
    if precision == "fp8":
        keep = json.loads((measured / "sensitivity.json").read_text(encoding="utf-8"))["keep_bf16"]
        options += ["--calibration", str(measured / "calibration.json"), "--keep-bf16", *keep]
    done = tool("to_onnx", "--model-dir", CHECKPOINT, "--out", onnx, *options)
    assert done.returncode == 0, done.stderr
    assert parity(["--engines", str(onnx), "--model-dir", str(CHECKPOINT), *SIZES]) == 0  # at most twice bf16's loss
    for sm in (89, 120):
        out = tmp_path / f"sm{sm}"
        arguments = ("--backend", "tensorrt_rtx", "--sm", sm, "--shapes", "64x64x34")
        done = tool("build_engine", "--model-dir", CHECKPOINT, "--onnx", onnx, "--out", out, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        built = Manifest.load(out)
        assert built.graphs.keys() == Manifest.load(onnx).graphs.keys()
        assert len(built.graphs) == 13
        require_parity(built, built.graphs)
        plans = {name: entry.extras["plan"] for name, entry in built.graphs.items()}
        assert all(plans[f"dit_block_{index:02d}"]["fused_attentions"] == 2 for index in range(3))
        assert any(plan["fp8_gemms"] for plan in plans.values()) == (precision == "fp8")
