import shutil
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from stepvideo_serve.engine.manifest import GraphEntry, GraphFile
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.errors import EngineError
from tests.engine.toy import SPEC, Graph, toy_inputs

ROWS = {"rows": Dim(2, 4, 16)}


def tensor_spec(name: str, shape: tuple[int | str, ...], dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def save_graph(
    path: Path, op: str, inputs: list[str], shape: list[int | str], elem_type: int = TensorProto.FLOAT
) -> Path:
    """A graph of one node with the input x and the output y, both of `shape` (but Concat, along a free axis)."""
    concat = op == "Concat"
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], axis=0) if concat else helper.make_node(op, inputs, ["y"])],
        "one_node",
        [helper.make_tensor_value_info("x", elem_type, shape)],
        [helper.make_tensor_value_info("y", elem_type, ["other"] if concat else shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"absent\.onnx must be an ONNX file, found none"):
        OrtRunner(SPEC, tmp_path / "absent.onnx")


def test_corrupt_file(tmp_path: Path) -> None:
    path = tmp_path / "corrupt.onnx"
    path.write_bytes(b"no graph at all")
    with pytest.raises(EngineError, match=r"corrupt\.onnx must be a valid ONNX graph"):
        OrtRunner(SPEC, path)


def test_missing_external_data(toy: Graph, tmp_path: Path) -> None:
    assert toy.onnx_path.with_name("toy.onnx.data").is_file()
    with pytest.raises(EngineError, match=r"toy\.onnx must be a valid ONNX graph with its external data"):
        OrtRunner(SPEC, Path(shutil.copy(toy.onnx_path, tmp_path)))


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (tensor_spec("x", ("rows",), "float16"), r"tensor\(float\)"),
        (tensor_spec("x", ("rows", 4)), r"\['n'\]"),
        (tensor_spec("other", ("rows",)), r"\['x'\]"),
    ],
)
def test_graph_of_another_signature(tmp_path: Path, tensor: TensorSpec, found: str) -> None:
    path = save_graph(tmp_path / "graph.onnx", "Abs", ["x"], ["n"])
    spec = EngineSpec("abs", (tensor,), (replace(tensor, name="y"),), ROWS)
    with pytest.raises(EngineError, match=f"graph.onnx must .*, found .*{found}"):
        OrtRunner(spec, path)


def test_graph_of_one_size_cannot_serve_a_range(tmp_path: Path) -> None:
    path = save_graph(tmp_path / "graph.onnx", "Abs", ["x"], [4])
    outer = (tensor_spec("x", ("rows",)),), (tensor_spec("y", ("rows",)),)
    with pytest.raises(EngineError, match=r'"x" in .* must be float32 \[rows\], found tensor\(float\) \[4\]'):
        OrtRunner(EngineSpec("abs", *outer, ROWS), path)
    with OrtRunner(EngineSpec("abs", *outer, {"rows": Dim(4, 4, 4)}), path) as runner:
        assert torch.equal(runner(x=-torch.ones(4))["y"], torch.ones(4))


@pytest.mark.parametrize(
    ("dtype", "elem_type"),
    [
        ("float16", TensorProto.FLOAT16),
        ("int64", TensorProto.INT64),
        ("int32", TensorProto.INT32),
        ("bool", TensorProto.BOOL),
        ("uint8", TensorProto.UINT8),
    ],
)
def test_dtypes(tmp_path: Path, dtype: str, elem_type: int) -> None:
    path = save_graph(tmp_path / "graph.onnx", "Identity", ["x"], ["n", 2], elem_type)
    shape = ("rows", 2)
    spec = EngineSpec("same", (tensor_spec("x", shape, dtype),), (tensor_spec("y", shape, dtype),), ROWS)
    values = torch.arange(6).reshape(3, 2).to(spec.inputs[0].torch_dtype)
    with OrtRunner(spec, path) as runner:
        assert torch.equal(runner(x=values)["y"], values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_dtypes_that_the_cpu_does_not_run(toy: Graph, dtype: str) -> None:
    spec = EngineSpec("low", (tensor_spec("x", ("rows",), dtype),), (tensor_spec("y", ("rows",)),), ROWS)
    with pytest.raises(EngineError, match=f'Engine low: "x" must have a dtype .*, got {dtype}'):
        OrtRunner(spec, toy.onnx_path)


def test_graph_whose_output_has_another_size_than_the_spec_says(tmp_path: Path) -> None:
    path = save_graph(tmp_path / "graph.onnx", "Concat", ["x", "x"], ["n"])
    spec = EngineSpec("twice", (tensor_spec("x", ("rows",)),), (tensor_spec("y", ("rows",)),), ROWS)
    with OrtRunner(spec, path) as runner, pytest.raises(EngineError, match=r"Engine twice: .*ONNX Runtime failed"):
        runner(x=torch.zeros(4))


def test_missing_package(toy: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="pip install onnxruntime"):
        OrtRunner(SPEC, toy.onnx_path)


def test_engine_id(toy: Graph) -> None:
    with OrtRunner(SPEC, toy.onnx_path) as runner:
        assert runner.engine_id.startswith("onnxruntime-")
        assert runner.engine_id.endswith(":toy.onnx")
    with OrtRunner(SPEC, toy.onnx_path, engine_id="abc") as runner:
        assert runner.engine_id == "abc"


def test_several_runners_at_once(toy: Graph) -> None:
    """They share one arena."""
    inputs = toy_inputs(4, 3)
    runners = [OrtRunner(SPEC, toy.onnx_path, threads=2) for _ in range(3)]
    expected = runners[0](**inputs)
    runners[0].close()
    for runner in runners[1:]:
        with runner:
            for name, output in runner(**inputs).items():
                assert torch.equal(output, expected[name])


@pytest.fixture
def copied(toy: Graph, tmp_path: Path) -> tuple[Path, GraphEntry]:
    """The toy graph with its external data in a folder of its own, and its record."""
    names = (toy.onnx_path.name, f"{toy.onnx_path.name}.data")
    for name in names:
        shutil.copy(toy.onnx_path.with_name(name), tmp_path)
    return tmp_path, GraphEntry(tuple(GraphFile.of(tmp_path, name) for name in names), "key", SPEC)


def test_what_was_compared_is_run_whatever_becomes_of_the_files(toy: Graph, copied: tuple[Path, GraphEntry]) -> None:
    """Bit for bit what the files give that ONNX Runtime opens itself, and gives no more once they are changed."""
    folder, entry = copied
    path, inputs = folder / entry.file, toy_inputs(4, 3)
    content = entry.read(folder)
    for record in entry.files:
        (folder / record.path).write_bytes(b"exchanged after the comparison")
    with OrtRunner(SPEC, toy.onnx_path) as plain, OrtRunner(SPEC, path, content=content) as runner:
        del content
        expected = plain(**inputs)
        for name, output in runner(**inputs).items():
            assert torch.equal(output, expected[name])
    with pytest.raises(EngineError, match="must be a valid ONNX graph"):
        OrtRunner(SPEC, path)


def test_external_data_changed_in_place_do_not_change_a_session(copied: tuple[Path, GraphEntry]) -> None:
    """Which a new session of the changed file shows to be no idle worry."""
    folder, entry = copied
    path, inputs, data = folder / entry.file, toy_inputs(4, 3), folder / entry.files[1].path
    with OrtRunner(SPEC, path, content=entry.read(folder)) as runner:
        before = {name: output.clone() for name, output in runner(**inputs).items()}
        with data.open("r+b") as file:
            file.write(b"\x40" * data.stat().st_size)
        for name, output in runner(**inputs).items():
            assert torch.equal(output, before[name])
    with OrtRunner(SPEC, path) as changed:
        assert any(not torch.equal(output, before[name]) for name, output in changed(**inputs).items())
