"""One sentence, and an exit status that is not 0, for each wrong argument or file."""

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from export.engines.engines import Options, build_engines
from export.engines.toolkit import check_target, toolkit_version
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.errors import ExportError
from stepvideo_serve.parallel.layout import Layout
from tests.engines.conftest import build


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(("--sm", "90"), "--sm must be one of 80, 86, 89, 120, 121 for tensorrt_rtx, got 90", id="sm"),
        pytest.param(("--layout", "tp4"), "layout tp4 must divide the DiT's 2 heads", id="layout"),
        pytest.param(("--layout", "tp2"), "has no tp0of2, tp1of2: export with --layout tp2", id="not exported"),
        pytest.param(("--layout", "tp3"), "correct 'tp3'", id="no layout"),
        pytest.param(("--shapes", "64x64"), "--shapes must be HEIGHTxWIDTHxFRAMES", id="shapes"),
        pytest.param(("--shapes", "64x60x17"), "WIDTH must be a positive multiple of 16, got 60", id="off the grid"),
        pytest.param(("--shapes", "32x32x17"), "must give tokens of 32 .. 131072, got 12", id="too small"),
        pytest.param(("--shapes", "64x64x17,64x64x34", "--fixed"), "--fixed builds for one size, got 2", id="fixed"),
        pytest.param(("--only", "dit_bolck_*"), "must match at least one graph", id="only"),
    ],
)
def test_wrong_arguments(graphs: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = build(graphs, tmp_path / "out", *options)
    assert done.returncode == 2
    assert done.stderr.startswith("build_engine: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("SM=77", "build_engine: --sm must be one of 80, 86, 89, 120, 121 for tensorrt_rtx, got 77"),
        ("LAYOUT=tp3", "build_engine: layout must be"),
        ("SHAPES=64x64", "build_engine: --shapes must be HEIGHTxWIDTHxFRAMES"),
        ("PRECISION=fp8", "export: --calibration goes with --precision fp8 or nvfp4, got none"),
        ("PRECISION=fp32", "export: Engines are built from graphs in bf16, fp16, fp8, nvfp4, found fp32"),
        ("LAYOUT=tp4", "export: layout tp4 must divide the DiT's 2 heads"),
    ],
)
def test_make_engines_says_what_is_wrong_before_it_exports(
    root: Path, checkpoint: Path, tmp_path: Path, given: str, message: str
) -> None:
    """The export of a full model takes hours. The environment is the one that runs the tests."""
    out = tmp_path / "out"
    command = ["make", "engines", f"MODEL_DIR={checkpoint}", f"OUT={out}", "INSTALLED=", "RTX_INSTALLED=", given]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(out.rglob("*.onnx"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (("tensorrt_rtx", 89, "fp32"), "Engines are built from graphs in bf16, fp16, fp8, nvfp4, found fp32"),
        (("tensorrt_rtx", 86, "fp8"), "fp8 needs SM 89 or newer, got 86"),
        (("tensorrt", 70, "bf16"), "--sm must be one of 80, .* for tensorrt, got 70"),
        (("tensorflow", 89, "bf16"), "--backend must be one of tensorrt, tensorrt_rtx"),
    ],
)
def test_what_no_engine_can_be_built_for(target: tuple[str, int, str], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        check_target(*target)


def test_no_graphs(tmp_path: Path) -> None:
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode == 2
    assert "manifest.json" in done.stderr
    assert not (tmp_path / "out").exists()


def test_engines_for_another_target_are_there(engines: Path, graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(engines / "manifest.json", out)
    done = build(graphs, out, sm=120)
    assert done.returncode == 2
    assert "choose another --out, or delete it" in done.stderr


def test_a_checkpoint_that_changed_since_the_export(graphs: Path, checkpoint: Path, tmp_path: Path) -> None:
    changed = tmp_path / "model"
    shutil.copytree(checkpoint, changed)
    weights = next((changed / "vae").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = build(graphs, tmp_path / "out", "--model-dir", changed)
    assert done.returncode == 2
    assert "which changed since: export them again" in done.stderr
    done = build(graphs, tmp_path / "out", "--model-dir", checkpoint, "--only", "dit_final")
    assert done.returncode == 0, done.stderr


def test_a_graph_that_is_not_the_one_exported(graphs: Path, tmp_path: Path) -> None:
    broken = tmp_path / "graphs"
    shutil.copytree(graphs, broken)
    data = broken / "dit_cross_00.onnx.data"
    content = bytearray(data.read_bytes())
    content[7] ^= 1
    data.write_bytes(content)
    done = build(broken, tmp_path / "out", "--only", "dit_cross_00")
    assert done.returncode == 1
    assert "dit_cross_00.onnx.data must have SHA-256" in done.stdout


def test_two_builds_into_one_folder(graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = build(graphs, out)
    assert done.returncode == 2
    assert "another is at work" in done.stderr


def test_tensorrt_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ExportError, match=r"tensorrt_rtx must be installed .* pip install tensorrt-rtx-cu13"):
        toolkit_version("tensorrt_rtx")


def test_tensorrt_builds_where_it_runs(graphs: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ExportError, match=r"tensorrt builds on a GPU, .*found none"):
        build_engines(graphs, tmp_path / "out", Options("tensorrt", 90, Layout()), show_progress=False)


def test_a_graph_without_a_parity_report_still_builds_and_says_so(graphs: Path, tmp_path: Path) -> None:
    """It is the server that refuses it."""
    bare = tmp_path / "graphs"
    shutil.copytree(graphs, bare)
    data = json.loads((bare / "manifest.json").read_text(encoding="utf-8"))
    del data["graphs"]["dit_final"]["extras"]["parity"]
    (bare / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    assert build(bare, tmp_path / "out", "--only", "dit_final").returncode == 0
    assert "parity" not in Manifest.load(tmp_path / "out").graph("dit_final").extras
