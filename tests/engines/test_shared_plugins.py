"""Plugins in graphs whose weights are inputs: the plan is that of the engine with its weights inside."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.compare.engines import Open, compare_engines
from export.graphs.recipe import CONSTANT, INPUT, Recipe
from export.graphs.shared import plan_shared
from export.graphs.weight_inputs import WeightsOutside, values_of
from export.quantize.calibration import Calibration
from export.quantize.fp8 import Fp8
from export.quantize.weight_set import make_weight_set
from export.to_onnx import export_graphs
from stepvideo_kernels.choice import Target
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.layer_weights import LayerWeights
from stepvideo_serve.engine.manifest import KEY, EngineTarget, Manifest
from stepvideo_serve.engine.parity import require_parity
from stepvideo_serve.engine.runner import EagerRunner, EngineRunner
from stepvideo_serve.fused.kernels_package import LOOKED_UP
from stepvideo_serve.parallel.layout import SINGLE, Layout
from stepvideo_serve.weights.weight_set import WeightSet
from tests.engines.conftest import build

TARGET = Target(89, "tensorrt_rtx")
FIGURES = ("gemms", "fp8_gemms", "fused_attentions", "plugins")


@pytest.fixture(autouse=True)
def _kernels(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that builds finds the plugins."""
    monkeypatch.setenv("PYTHONPATH", f"{root / 'kernels'}:{root}")


def recipe_of(precision: str, calibration: Path, weights: str) -> Recipe:
    fp8 = Fp8(Calibration.load(calibration)) if precision == "fp8" else None
    return Recipe(precision, fp8, "plugin", TARGET, compare=weights == INPUT, weights=weights)


def built(model: Path, out: Path, recipe: Recipe, only: list[str], layout: Layout = SINGLE) -> Manifest:
    graphs = out / "onnx"
    export_graphs(Checkpoint(model), graphs, only=only, show_progress=False, recipe=recipe, layout=layout)
    done = build(graphs, out, "--layout", layout, "--shapes", "64x64x34")
    assert done.returncode == 0, done.stdout + done.stderr
    return Manifest.load(out)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_plan_is_that_with_constants(checkpoint: Path, calibration: Path, tmp_path: Path, precision: str) -> None:
    """And its plugins look up the same kernels."""
    found = {}
    for weights, name in ((CONSTANT, "dit_block_00"), (INPUT, "dit_block")):
        recipe = recipe_of(precision, calibration, weights)
        manifest = built(checkpoint, tmp_path / weights, recipe, [name])
        extras = manifest.graph(name).extras
        found[weights] = {figure: extras["plan"][figure] for figure in FIGURES}, extras[LOOKED_UP]
    assert found[INPUT] == found[CONSTANT]
    assert found[INPUT][0]["plugins"] == 5
    assert found[INPUT][0]["fp8_gemms"] == (6 if precision == "fp8" else 0)
    entry = manifest.graph("dit_block_00")
    assert entry.extras["plan"]["weight_bytes"] < 4096
    require_parity(manifest, ["dit_block_00", "dit_block_01"])


def test_slices_of_tokens(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    """Attention is a graph of its own there, which serves every block."""
    recipe = recipe_of("fp8", calibration, INPUT)
    manifest = built(checkpoint, tmp_path, recipe, ["dit_core*", "dit_qkv"], Layout.parse("sp2"))
    plugins = {entry.spec.name: entry.extras["plan"]["plugins"] for entry in manifest.graphs.values()}
    assert sorted(plugins.values()) == [1, 2]


@pytest.mark.parametrize("layout", ["single", "sp2"])
def test_the_weight_set_has_what_such_graphs_take(
    checkpoint: Path, calibration: Path, tmp_path: Path, layout: str
) -> None:
    """The one set for all: scales of codes and values are read off what it holds."""
    model, recipe = Checkpoint(checkpoint), recipe_of("fp8", calibration, INPUT)
    assert recipe.fp8 is not None
    make_weight_set(model, recipe.fp8, tmp_path / "fp8", show_progress=False)
    weights = LayerWeights(model, weight_set=WeightSet.load(tmp_path / "fp8"))
    plan = plan_shared(model, recipe, Layout.parse(layout), split_llm=False)
    only = ["dit_block"] if layout == "single" else ["dit_core*", "dit_qkv"]
    manifest = export_graphs(
        model, tmp_path / "onnx", only=only, show_progress=False, recipe=recipe, layout=Layout.parse(layout)
    )
    for name, entry in manifest.graphs.items():
        layer = list(plan.kinds[name].layers.values())[-1]
        expected = values_of(recipe.build_shared(plan.versions(layer)[0], model).module, entry.spec)
        weights.check(layer, entry.spec)
        given = weights.of(layer, entry.spec)
        assert given.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(given[key].view(torch.uint8), value.view(torch.uint8)), f"{layer}: {key}"


class Given(nn.Module):
    """A module without its weights, and those that an engine was given."""

    def __init__(self, outside: WeightsOutside, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._outside, self._weights = outside, weights

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        called: Tensor | tuple[Tensor, ...] = self._outside(*inputs, *self._weights)
        return called


def test_verify_gives_such_engines_their_weights(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    """By their names in a graph with plugins; the operators' formulas stand in for the driver."""
    model, recipe = Checkpoint(checkpoint), replace(recipe_of("fp8", calibration, INPUT), compare=False)
    graphs = export_graphs(model, tmp_path, only=["dit_block"], show_progress=False, recipe=recipe)
    target = EngineTarget(TARGET.toolkit, "1.7", TARGET.sm, "single")
    replace(graphs, extra={**graphs.extra, KEY: target.to_json()}).save(tmp_path)
    plan = plan_shared(model, recipe, SINGLE, split_llm=False)

    def opener(directory: Path, manifest: Manifest) -> Open:
        del directory

        def open_engine(name: str, weights: Mapping[str, Tensor]) -> EngineRunner:
            spec = manifest.graph(name).spec
            other = recipe.build_shared(plan.versions("dit_block_00")[0], model).module
            outside = WeightsOutside(other, spec)
            return EagerRunner(spec, Given(outside, [weights[weight.name] for weight in spec.weights]))

        return open_engine

    compare_engines(tmp_path, checkpoint, calibration, opener)
    rows = Manifest.load(tmp_path).graph("dit_block").extras["parity"]
    assert {(row["backend"], row["layer"]) for row in rows} == {("engine", 0), ("engine", 1)}
    assert all(0 < row["error"] <= row["allowed"] for row in rows)
