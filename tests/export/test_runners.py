"""Runners beside each other by Polygraphy's Comparator, with the rule of twice what torch loses."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from polygraphy.comparator import RunResults
from polygraphy.comparator.struct import AccuracyResults
from torch import Tensor, nn

from export.compare.engines import GRAPHS, _twin
from export.compare.one_graph import ROUND_OFF, compare_engine
from export.compare.runners import MEASURE, REFERENCE, Contestant, compare_runners
from stepvideo_serve.engine.manifest import GRAPH, GraphEntry, GraphFile, Manifest
from stepvideo_serve.engine.runner import EagerRunner, EngineRunner
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec

WIDTH = 32
DIMS = MappingProxyType({"tokens": Dim(1, 4, 16)})


class Product(nn.Module):
    """y = x @ w, times a factor."""

    def __init__(self, dtype: torch.dtype, factor: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator).to(dtype), requires_grad=False)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight) * self.factor


def contestant(name: str, dtype: str, factor: float = 1.0, opened: list[EngineRunner] | None = None) -> Contestant:
    """`opened`: all that have been opened, of which one at a time may be open."""
    spec = EngineSpec(
        "product", (TensorSpec("x", dtype, ("tokens", WIDTH)),), (TensorSpec("y", dtype, ("tokens", WIDTH)),), DIMS
    )
    torch_dtype = spec.inputs[0].torch_dtype
    generator = torch.Generator().manual_seed(1)
    inputs = [{"x": torch.randn(count, WIDTH, generator=generator).to(torch_dtype)} for count in (3, 5)]

    def open_runner() -> EngineRunner:
        before = opened if opened is not None else []
        assert all(runner._closed for runner in before)
        before.append(EagerRunner(spec, Product(torch_dtype, factor)))
        return before[-1]

    return Contestant(name, open_runner, inputs)


@pytest.mark.parametrize(
    ("factor", "passes"), [(1.0, True), (1.02, False), (float("nan"), False), (float("inf"), False)]
)
def test_a_runner_is_judged_by_what_torch_loses(factor: float, passes: bool, tmp_path: Path) -> None:
    """In bf16; the results are read back by Polygraphy."""
    opened = list[EngineRunner]()
    ours = [
        contestant(REFERENCE, "float32", opened=opened),
        contestant(MEASURE, "bfloat16", opened=opened),
        contestant("engine", "bfloat16", factor, opened),
    ]
    found = compare_runners(ours, ROUND_OFF, tmp_path / "product")
    assert [runner._closed for runner in opened] == [True] * 3
    outputs = RunResults.load(str(tmp_path / "product.outputs.json"))
    assert list(outputs.keys()) == [REFERENCE, MEASURE, "engine"]
    assert [one["y"].shape for one in outputs["engine"]] == [(3, WIDTH), (5, WIDTH)]
    (accuracy,) = AccuracyResults.load(str(tmp_path / "product.accuracy.json"))
    assert [bool(one["y"]) for one in accuracy[REFERENCE, MEASURE]] == [True, True]
    assert [bool(one["y"]) for one in accuracy[REFERENCE, "engine"]] == [passes, passes]
    with ours[0].open() as reference:
        assert torch.equal(torch.from_numpy(found[REFERENCE][0]["y"]), reference(**ours[0].inputs[0])["y"])


def test_an_exact_measure_allows_a_rounding(tmp_path: Path) -> None:
    """Where torch loses nothing, twice nothing would forbid rounding."""
    ours = [
        contestant(REFERENCE, "float32"),
        contestant(MEASURE, "float32"),
        contestant("fine", "float32", 1 + ROUND_OFF),
        contestant("off", "float32", 1 + 4 * ROUND_OFF),
    ]
    compare_runners(ours, ROUND_OFF, tmp_path / "product")
    (accuracy,) = AccuracyResults.load(str(tmp_path / "product.accuracy.json"))
    assert all(bool(one["y"]) for one in accuracy[REFERENCE, "fine"])
    assert not any(bool(one["y"]) for one in accuracy[REFERENCE, "off"])


def write_product(path: Path, weight: Tensor) -> None:
    """The product as a graph in bf16."""
    shape: list[str | int | None] = ["tokens", WIDTH]
    ends = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, shape) for name in ("x", "y")]
    stored = helper.make_tensor("w", TensorProto.BFLOAT16, [WIDTH, WIDTH], weight.float().flatten().tolist())
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [stored])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.05, False)])
def test_an_engine_beside_its_graph(factor: float, passes: bool, tmp_path: Path) -> None:
    """The rows are those of the engine; the graph joins where it is the one that the engine was built from."""
    spec = contestant("engine", "bfloat16").open().spec
    graphs = tmp_path / GRAPHS
    graphs.mkdir()
    write_product(graphs / "product.onnx", Product(torch.bfloat16).weight)
    source = GraphEntry((GraphFile.of(graphs, "product.onnx"),), "the graph", spec)
    Manifest("", "bf16", {}, {"product": source}).save(graphs)
    entry = replace(source, key="the engine", extras={GRAPH: "the graph"})
    twin = _twin(tmp_path, entry, tmp_path)
    assert twin == tmp_path / "product.onnx"
    assert _twin(tmp_path, replace(entry, extras={GRAPH: "another"}), tmp_path) is None
    assert _twin(tmp_path, replace(entry, extras={**entry.extras, "plan": {"plugins": 1}}), tmp_path) is None
    with contestant("engine", "bfloat16", factor).open() as runner:
        rows = compare_engine(
            runner, lambda: Product(torch.float32), lambda: Product(torch.bfloat16), twin, tmp_path / "product"
        )
    assert {row["backend"] for row in rows} == {"engine"}
    assert all((row["error"] <= row["allowed"]) is passes for row in rows)
    (accuracy,) = AccuracyResults.load(str(tmp_path / "product.accuracy.json"))
    assert all(bool(one["y"]) for one in accuracy[REFERENCE, "onnxruntime"])
    assert all(bool(one["y"]) is passes for one in accuracy[REFERENCE, "engine"])
