"""Real builds by TensorRT-RTX, which needs no GPU for them, of the smallest checkpoint."""

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from export import build_engine
from export.quantize.calibration import PARTS, Calibration
from export.tiny_checkpoint import write_checkpoint
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.fused.layers import OPERANDS, all_names
from tests.mini import MINI

SHAPES = "64x64x17"
# Heads of Step-LLM have 16 channels: for 8, TensorRT has no attention kernel.
SMALL = replace(MINI, dit=replace(MINI.dit, llm_channels=96), llm=replace(MINI.llm, width=96))
AMAX = 12.0  # far above what the random weights give
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def _tensorrt_rtx() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        return
    reason = "needs tensorrt-rtx-cu13: make test-engines installs it"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def tool(root: Path) -> Run:
    """tool("to_onnx", "--only", "dit_*", ...): runs python -m export.<name> with one thread."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"export.{name}", *map(str, arguments), "--quiet"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=1200
        )

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    write_checkpoint(folder, SMALL)
    return folder


@pytest.fixture(scope="session")
def graphs(checkpoint: Path, tool: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All graphs but the Video-VAE's in bf16."""
    out = tmp_path_factory.mktemp("graphs") / "bf16"
    export(tool, checkpoint, out, "dit_*", "step_llm", "hunyuan_clip")
    return out


@pytest.fixture(scope="session")
def vae_graphs(checkpoint: Path, tool: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Video-VAE's graphs in bf16."""
    out = tmp_path_factory.mktemp("graphs") / "vae"
    export(tool, checkpoint, out, "vae_*")
    return out


def export(tool: Run, model_dir: Path, out: Path, *only: str) -> None:
    """export.to_onnx in bf16; more options may follow the names."""
    done = tool("to_onnx", "--model-dir", model_dir, "--out", out, "--precision", "bf16", "--only", *only)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def calibration(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same range for every tensor."""
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    model = Checkpoint(checkpoint)
    layers = all_names(model.dit_config, model.llm_config)
    names = [name for name in layers if not name.endswith(".core")]
    names += [f"{name}.{operand}" for name in layers if name.endswith(".core") for operand in OPERANDS]
    digests = {part: model.digest(part) for part in PARTS}
    Calibration(digests, {}, dict.fromkeys(names, AMAX)).save(path)
    return path


@pytest.fixture(scope="session")
def fp8_graphs(checkpoint: Path, calibration: Path, tool: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of the DiT's first block and of Step-LLM in FP8."""
    return quantised(checkpoint, calibration, tool, tmp_path_factory.mktemp("graphs") / "fp8", "fp8")


@pytest.fixture(scope="session")
def nvfp4_graphs(checkpoint: Path, calibration: Path, tool: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with linear layers in NVFP4."""
    return quantised(checkpoint, calibration, tool, tmp_path_factory.mktemp("graphs") / "nvfp4", "nvfp4")


def quantised(model_dir: Path, calibration: Path, tool: Run, out: Path, precision: str) -> Path:
    done = tool(
        *("to_onnx", "--model-dir", model_dir, "--out", out, "--precision", precision),
        *("--calibration", calibration, "--only", "dit_block_00", "step_llm"),
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def engines(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engines of `graphs` for SM 89."""
    out = tmp_path_factory.mktemp("engines") / "sm89"
    done = build(graphs, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def build(graphs: Path, out: Path, *options: object, sm: int = 89) -> subprocess.CompletedProcess[str]:
    """python -m export.build_engine by TensorRT-RTX for videos of 64x64x17, in this process to save its imports."""
    given = ("--onnx", graphs, "--out", out, "--backend", "tensorrt_rtx", "--sm", sm, "--shapes", SHAPES, "--quiet")
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = build_engine.main([str(argument) for argument in (*given, *options)])
    return subprocess.CompletedProcess("build_engine", status, stdout.getvalue(), stderr.getvalue())
