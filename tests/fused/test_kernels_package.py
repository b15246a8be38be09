"""Without the folder kernels/ on the path: what needs its package says so in one sentence, the rest works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepvideo_serve.fused.kernels_package import require_kernels

SENTENCE = (
    "needs the package stepvideo_kernels, which was not found: put the folder kernels of the checkout on PYTHONPATH."
)
ENGINE = """
from pathlib import Path
from stepvideo_serve.engine.manifest import GraphEntry, GraphFile, Manifest
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import SetupError
from stepvideo_serve.fused.kernels_package import register_plugins

def entry(plugins):
    file = GraphFile("one.engine", 1, "0" * 64)
    return GraphEntry((file,), "key", EngineSpec("one", (), (), {}), {"plan": {"plugins": plugins}})

manifest = Manifest("", "bf16", {}, {})
register_plugins(None, Path(), {"step_llm": entry([])}, manifest)
try:
    register_plugins(None, Path(), {"step_llm": entry([]), "dit_block_00": entry(["attention"])}, manifest)
except SetupError as error:
    print(error)
"""


def without_kernels(root: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def test_with_the_package_nothing_is_said() -> None:
    require_kernels("This test")


@pytest.mark.parametrize("command", ["export.to_onnx", "export.parity"])
def test_commands_start_without_the_package(root: Path, command: str) -> None:
    done = without_kernels(root, "-m", command, "--help")
    assert done.returncode == 0, done.stderr


def test_an_export_for_an_architecture_says_what_is_missing(root: Path, tmp_path: Path) -> None:
    target = ("--sm", "89", "--toolkit", "tensorrt_rtx", "--precision", "bf16")
    folders = ("--model-dir", str(root / "toyworld" / "checkpoint"), "--out", str(tmp_path / "out"))
    done = without_kernels(root, "-m", "export.to_onnx", *folders, *target)
    assert (done.returncode, done.stderr) == (2, f"export: --sm {SENTENCE}\n")
    assert not (tmp_path / "out").exists()


def test_an_engine_with_plugins_says_what_is_missing(root: Path) -> None:
    done = without_kernels(root, "-c", ENGINE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"The engine dit_block_00, which has plugins, {SENTENCE}\n"
