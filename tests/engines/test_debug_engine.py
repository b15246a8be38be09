"""The command lines of `make debug-engine`: printed, and run in a shell as far as that goes without a GPU."""

import contextlib
import io
import os
import subprocess
from pathlib import Path

import onnx
import pytest

from export import debug_engine
from stepvideo_serve.engine.manifest import Manifest
from tests.engines.conftest import build

BLOCK = "dit_block_00"
NEEDS_GPU = " (needs the GPU)"


@pytest.fixture(scope="module")
def printed(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of the lines; each as a script by the question that it answers, marked where it needs a GPU."""
    out = tmp_path_factory.mktemp("debug")
    assert build(graphs, out / "engines", "--only", BLOCK).returncode == 0
    command = ["--engines", str(out / "engines"), "--onnx", str(graphs), "--graph", "dit_block", "--out", str(out)]
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert debug_engine.main(command) == debug_engine.PRINTED
    before, *blocks = stdout.getvalue().split("\n\n")
    scripts = dict(block.removeprefix("# ").split("\n", 1) for block in blocks[:-1])
    return out / BLOCK, {question: f"{before}\n{line}" for question, line in scripts.items()}


def run(script: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POLYGRAPHY")}
    return subprocess.run(
        ["bash", "-ec", script],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )


def test_lines_that_need_no_gpu_answer_their_questions(printed: tuple[Path, dict[str, str]]) -> None:
    folder, scripts = printed
    answers = {question: run(script) for question, script in scripts.items() if NEEDS_GPU not in question}
    for question, done in answers.items():
        assert done.returncode == 0, f"{question}\n{done.stdout}"
    assert "Attention" in answers["What does the graph hold?"].stdout
    assert (folder / "whole.engine").stat().st_size > 0
    assert (folder / "reference.json").stat().st_size > 0
    whole, half = (onnx.load(str(folder / name), load_external_data=False) for name in ("twin.onnx", "half.onnx"))
    assert 0 < len(half.graph.node) < len(whole.graph.node)


def test_lines_that_need_a_gpu_get_as_far_as_the_driver(printed: tuple[Path, dict[str, str]]) -> None:
    _, scripts = printed
    lines = {question: script for question, script in scripts.items() if NEEDS_GPU in question}
    assert len(lines) == 4
    for question, script in lines.items():
        done = run(script)
        assert "CUDA" in done.stdout, f"{question}\n{done.stdout}"
        assert "unrecognized arguments" not in done.stdout


def test_a_graph_that_is_not_there(graphs: Path, engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--engines", str(engines), "--onnx", str(graphs), "--graph", "dit_bolck"]
    assert debug_engine.main(command) == debug_engine.UNUSABLE
    error = capsys.readouterr().err
    assert error.startswith("debug_engine: --graph must be a graph or a kind of graphs, got 'dit_bolck': name one of ")
    assert "dit_block_00" in error


def test_an_engine_that_has_not_been_built(graphs: Path, engines: Path, tmp_path: Path) -> None:
    """Its ranges are those of --shapes."""
    manifest = Manifest.load(engines)
    kept = {name: entry for name, entry in manifest.graphs.items() if name != BLOCK}
    Manifest(manifest.checkpoint, manifest.precision, manifest.tools, kept, manifest.extra).save(tmp_path)
    stdout = io.StringIO()
    command = ["--engines", str(tmp_path), "--onnx", str(graphs), "--graph", BLOCK, "--shapes", "64x64x17"]
    with contextlib.redirect_stdout(stdout):
        assert debug_engine.main([*command, "--out", str(tmp_path)]) == debug_engine.PRINTED
    assert "--trt-max-shapes 'tokens:[1,48," in stdout.getvalue()
