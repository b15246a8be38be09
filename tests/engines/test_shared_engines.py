"""Engines whose weights are inputs: the plan is that of the engine with its weights inside, the file is small."""

from dataclasses import replace
from pathlib import Path

import pytest

from export.graphs.recipe import INPUT
from stepvideo_serve.engine.manifest import LAYERS, Manifest
from stepvideo_serve.engine.parity import require_parity
from tests.engines.conftest import Run, build

ONLY = ("dit_block", "dit_cross", "step_llm_embed", "step_llm_layer")
FIGURES = ("gemms", "fp8_gemms", "fused_attentions")
LARGEST_BYTES = 4 << 20  # of machine code


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shared_graphs(
    checkpoint: Path, calibration: Path, tool: Run, precision: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("shared") / precision
    given = ("--calibration", calibration) if precision == "fp8" else ()
    done = tool(
        *("to_onnx", "--model-dir", checkpoint, "--out", out, "--precision", precision, "--weights", INPUT),
        *(*given, "--only", *ONLY),
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def constant_graphs(
    checkpoint: Path, calibration: Path, tool: Run, tmp_path_factory: pytest.TempPathFactory, precision: str
) -> Path:
    out = tmp_path_factory.mktemp("constant") / precision
    given = ("--calibration", calibration) if precision == "fp8" else ()
    done = tool(
        *("to_onnx", "--model-dir", checkpoint, "--out", out, "--precision", precision, "--no-compare"),
        *(*given, "--only", "dit_block_00", "dit_cross_00", "step_llm"),
    )
    assert done.returncode == 0, done.stderr
    return out


def figures(manifest: Manifest, name: str) -> dict[str, int]:
    plan = manifest.graph(name).extras["plan"]
    return {figure: plan[figure] for figure in FIGURES}


@pytest.mark.parametrize("sm", [89, 120])
def test_the_plan_is_that_of_the_engine_with_constants(
    shared_graphs: Path, constant_graphs: Path, precision: str, sm: int, tmp_path: Path
) -> None:
    for name, graphs in (("shared", shared_graphs), ("constant", constant_graphs)):
        done = build(graphs, tmp_path / name, sm=sm)
        assert done.returncode == 0, done.stdout + done.stderr
    shared, constant = (Manifest.load(tmp_path / name) for name in ("shared", "constant"))
    assert shared.graphs.keys() == set(ONLY)
    require_parity(shared, ["dit_block_00", "dit_block_01", "dit_cross_01", "step_llm_embed", "step_llm_layer_01"])
    block, expected = figures(shared, "dit_block_00"), figures(constant, "dit_block_00")
    assert block == expected
    assert (block["fused_attentions"], block["fp8_gemms"]) == (2, 6 if precision == "fp8" else 0)
    layer, whole = figures(shared, "step_llm_layer_00"), figures(constant, "step_llm")
    count = len(shared.graph("step_llm_layer_00").extras[LAYERS])
    assert {figure: count * value for figure, value in layer.items()} == whole
    for entry in shared.graphs.values():
        assert entry.files[0].size_bytes < LARGEST_BYTES
        assert entry.extras["plan"]["weight_bytes"] < 4096


def test_other_weights_need_no_other_engine(shared_graphs: Path, tmp_path: Path) -> None:
    """The rows of a report that has grown are taken over."""
    only = ("--only", "dit_cross")
    assert build(shared_graphs, tmp_path, *only).returncode == 0
    before = (tmp_path / "dit_cross.engine").stat().st_mtime_ns
    source = Manifest.load(shared_graphs)
    entry = source.graph("dit_cross")
    rows = entry.extras["parity"]
    grown = {**entry.extras, "parity": [*rows, *({**row, "weights": "of another checkpoint"} for row in rows)]}
    replace(source, graphs={**source.graphs, "dit_cross": replace(entry, extras=grown)}).save(shared_graphs)
    try:
        assert "0 built, 1 up to date" in build(shared_graphs, tmp_path, *only).stdout
    finally:
        source.save(shared_graphs)
    assert Manifest.load(tmp_path).graph("dit_cross").extras["parity"] == grown["parity"]
    assert (tmp_path / "dit_cross.engine").stat().st_mtime_ns == before
