"""A whole trained checkpoint to engines, in both precisions and for two architectures."""

import json
import subprocess
from pathlib import Path

import pytest

from export.parity import main as parity
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.engine.parity import require_parity
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


@pytest.mark.parametrize(("precision", "sm", "split_llm"), [("bf16", 89, False), ("fp8", 120, True)])
def test_make_engines_of_two_tensor_parallel_ranks(
    root: Path, measured: Path, tmp_path: Path, precision: str, sm: int, split_llm: bool
) -> None:
    """The command as it is typed; a rank of the DiT has one head. The environment is the one that runs the tests."""
    given = {"MODEL_DIR": CHECKPOINT, "OUT": tmp_path, "LAYOUT": "tp2", "PRECISION": precision, "SM": sm}
    given |= {"BACKEND": "tensorrt_rtx", "SHAPES": "64x64x34", "INSTALLED": "", "RTX_INSTALLED": ""}
    if split_llm:
        given["SPLIT_LLM"] = "1"
    if precision == "fp8":
        keep = json.loads((measured / "sensitivity.json").read_text(encoding="utf-8"))["keep_bf16"]
        given |= {"CALIBRATION": measured / "calibration.json", "KEEP_BF16": " ".join(keep)}
    command = ["make", "engines", *(f"{name}={value}" for name, value in given.items())]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    pieces = [f"dit_{piece}_{index:02d}" for index in range(3) for piece in ("attn", "text", "ff", "cross")]
    halves = [f"step_llm_{half}_{index:02d}" for index in range(3) for half in ("attn", "ff")]
    own = {*pieces, *([*halves, "step_llm_embed"] if split_llm else [])}
    assert ("step_llm" in Manifest.load(tmp_path).graphs) != split_llm
    for rank in ("tp0of2", "tp1of2"):
        built = Manifest.load(tmp_path / rank)
        assert built.graphs.keys() == own
        built.verify(tmp_path / rank, hashes=True)
        require_parity(built, built.graphs)
        plans = {name: entry.extras["plan"] for name, entry in built.graphs.items()}
        assert all(plans[name]["fused_attentions"] == ("_attn_" in name or "_text_" in name) for name in plans)
        assert any(plan["fp8_gemms"] for plan in plans.values()) == (precision == "fp8")
