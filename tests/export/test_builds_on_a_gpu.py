"""Engines of data-centre TensorRT, on a contract stub (builder_stub.py): what is timed once, several builds at a time,
and plans that are read from the EngineInspector."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from export import build_engine
from stepvideo_serve.engine.manifest import GraphEntry, GraphFile, Manifest
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec

H100 = "NVIDIA H100 80GB HBM3"
WIDTH = 64
Run = Callable[..., subprocess.CompletedProcess[str]]


def write_graphs(folder: Path, products: dict[str, list[str]]) -> Path:
    """A folder of graphs, each a row of products in bf16; products of one kind ("wide_0", "wide_1") have a tactic in
    common."""
    folder.mkdir()
    graphs = {}
    for name, nodes in products.items():
        write_graph(folder / f"{name}.onnx", nodes)
        tensors = [TensorSpec(one, "bfloat16", (1, "tokens", WIDTH)) for one in ("x", "y")]
        spec = EngineSpec(name, (tensors[0],), (tensors[1],), {"tokens": Dim(32, 48, 64)})
        graphs[name] = GraphEntry((GraphFile.of(folder, f"{name}.onnx"),), f"key of {name}", spec)
    Manifest("checkpoint", "bf16", {}, graphs).save(folder)
    return folder


def write_graph(path: Path, nodes: list[str]) -> None:
    values = ["x", *(f"t{index}" for index in range(1, len(nodes))), "y"]
    steps = [
        helper.make_node("MatMul", [values[index], f"w{index}"], [values[index + 1]], name)
        for index, name in enumerate(nodes)
    ]
    shape: list[str | int | None] = [1, "tokens", WIDTH]
    ends = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, shape) for name in ("x", "y")]
    weights = [
        helper.make_tensor(f"w{index}", TensorProto.BFLOAT16, [WIDTH, WIDTH], [0.0] * WIDTH**2)
        for index in range(len(nodes))
    ]
    graph = helper.make_graph(steps, path.stem, ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    """Three graphs, of which the first two have their tactics in common."""
    return write_graphs(tmp_path / "onnx", {"a": ["wide_0", "wide_1"], "b": ["wide_2"], "c": ["wide_3", "narrow_0"]})


@pytest.fixture
def run(tmp_path: Path, root: Path, graphs: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(*options, gpus=..., version=..., ...): export.build_engine on a machine with these GPUs, in this process to
    save its imports; its children import the stub by the names of the vendor's packages."""

    def start(
        *options: object, gpus: str = H100, version: str = "11.4.0.106", **more: str
    ) -> subprocess.CompletedProcess[str]:
        stub = tmp_path / f"stub-{version}"
        write_stub(stub, version)
        given = ["--onnx", graphs, "--out", tmp_path / "out", "--backend", "tensorrt", "--sm", 90, "--quiet", *options]
        stdout, stderr = io.StringIO(), io.StringIO()
        variables = {"PYTHONPATH": f"{stub}:{root}", "STUB_GPUS": gpus, "STUB_VERSION": version, **more}
        with monkeypatch.context() as machine:
            machine.syspath_prepend(stub)
            machine.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            for name, value in variables.items():
                machine.setenv(name, value)
            for name in ("cuda", "cuda.bindings", "cuda.bindings.driver"):
                machine.delitem(sys.modules, name, raising=False)
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                status = build_engine.main([str(argument) for argument in given])
        return subprocess.CompletedProcess("build_engine", status, stdout.getvalue(), stderr.getvalue())

    return start


def write_stub(folder: Path, version: str) -> None:
    """What a child imports by the names of the vendor's packages."""
    for name, stub in (("tensorrt", "builder_stub"), ("cuda/bindings/driver", "driver_stub")):
        package = folder / name
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(f"from tests.export.{stub} import *\n", encoding="utf-8")
    for name in ("cuda", "cuda/bindings"):
        (folder / name / "__init__.py").touch()
    with (folder / "tensorrt/__init__.py").open("a", encoding="utf-8") as module:
        module.write("from tests.export.builder_stub import __version__\n")
    metadata = folder / f"tensorrt_cu13-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: tensorrt-cu13\nVersion: {version}\n", encoding="utf-8")


def engine(out: Path, name: str) -> dict[str, Any]:
    """What the stub wrote: which tactics were timed, and where."""
    found: dict[str, Any] = json.loads((out / f"{name}.engine").read_bytes())
    return found


def caches(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "timing").glob("*.cache"))


def test_what_one_child_has_timed_the_next_does_not_time_again(run: Run, tmp_path: Path) -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    assert [engine(out, name)["timed"] for name in "abc"] == [["MatMul wide"], [], ["MatMul narrow"]]
    assert caches(out) == ["tensorrt-11.4.0.106.NVIDIA-H100-80GB-HBM3.cache"]
    (out / "c.engine").unlink()
    done = run()
    assert "1 built, 2 up to date" in done.stdout
    assert engine(out, "c")["timed"] == []


def test_another_version_times_anew_and_another_gpu_has_its_own(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("--only", "a").returncode == 0
    (out / "a.engine").unlink()
    assert run("--only", "a", gpus="NVIDIA H200").returncode == 0
    assert engine(out, "a")["timed"] == ["MatMul wide"]
    assert len(caches(out)) == 2
    done = run("--only", "a", version="11.5.0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert engine(out, "a")["timed"] == ["MatMul wide"]
    assert caches(out) == ["tensorrt-11.5.0.1.NVIDIA-H100-80GB-HBM3.cache"]


def test_a_cache_that_was_cut_off_is_written_anew(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("--only", "a").returncode == 0
    (cache,) = (out / "timing").glob("*.cache")
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2])
    (out / "a.engine").unlink()
    done = run("--only", "a")
    assert done.returncode == 0, done.stdout + done.stderr
    assert engine(out, "a")["timed"] == ["MatMul wide"]
    assert cache.read_bytes() == whole


def test_builds_at_a_time_have_a_gpu_each(run: Run, tmp_path: Path) -> None:
    done = run("--jobs", 2, gpus=f"{H100},{H100}", STUB_SECONDS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    assert {engine(out, name)["visible"] for name in "ab"} == {"0", "1"}
    spans = sorted(engine(out, name)["time_s"] for name in "ab")
    assert spans[1][0] < spans[0][1], "the first two were built at the same time"
    (cache,) = (out / "timing").glob("*.cache")
    assert json.loads(cache.read_bytes())["tactics"] == ["MatMul narrow", "MatMul wide"]
    assert set(Manifest.load(out).graphs) == {"a", "b", "c"}


def test_gpus_keep_the_names_that_the_machine_gives_them(run: Run, tmp_path: Path) -> None:
    done = run("--jobs", 2, gpus=f"L4,{H100},{H100}", CUDA_VISIBLE_DEVICES="GPU-1,GPU-2", STUB_SECONDS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {engine(tmp_path / "out", name)["visible"] for name in "ab"} == {"GPU-1", "GPU-2"}


@pytest.mark.parametrize(
    ("jobs", "sentence"),
    [
        (3, "--jobs needs a GPU for each build, 3 were asked for, found 2 (NVIDIA H100 80GB HBM3): ask for at most 2."),
        (0, "--jobs must be at least 1 build at a time, got 0: correct it."),
    ],
)
def test_more_builds_than_gpus(run: Run, jobs: int, sentence: str) -> None:
    done = run("--jobs", jobs, gpus=f"{H100},{H100}")
    assert (done.returncode, done.stderr.strip()) == (2, f"build_engine: {sentence}")


@pytest.mark.parametrize("form", ["10", "11"])
def test_the_plan_is_read_from_the_inspector(run: Run, tmp_path: Path, form: str) -> None:
    done = run(STUB_FORM=form)
    assert done.returncode == 0, done.stdout + done.stderr
    entry = Manifest.load(tmp_path / "out").graph("c")
    assert (entry.extras["plan"]["gemms"], entry.extras["plan"]["activation_bytes"]) == (2, 4096)
    plan = json.loads((tmp_path / "out" / "c.plan.json").read_text(encoding="utf-8"))
    assert [layer["onnx_nodes"] for layer in plan["layers"]] == [["wide_3"], ["narrow_0"]]
    bindings = {row["name"]: row for row in plan["bindings"]}
    assert (bindings["x"]["mode"], bindings["x"]["dtype"]) == ("Input", "BFloat16")
    assert bindings["x"]["profile"] == [[1, 32, 64], [1, 48, 64], [1, 64, 64]]
    assert bindings["y"]["profile"] == []


def test_a_plan_that_is_not_as_expected(run: Run, tmp_path: Path) -> None:
    """An error; a warning on record with --plan warn; and an error again without it, with nothing built."""
    wrong = {"STUB_PRODUCTS": "Float"}
    sentence = "no fp32 GEMM was expected but 0, found also: wide_2_myl0_1"
    done = run("--only", "b", **wrong)
    assert done.returncode == 1
    assert sentence in done.stdout
    assert not (tmp_path / "out" / "b.engine").exists()
    done = run("--only", "b", "--plan", "warn", **wrong)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"b: warning: {sentence}" in done.stdout
    assert Manifest.load(tmp_path / "out").graph("b").extras["plan_warnings"] == [sentence]
    done = run("--only", "b", "--plan", "warn", **wrong)
    assert "0 built, 1 up to date" in done.stdout
    assert f"b: warning: {sentence}" in done.stdout
    before = (tmp_path / "out" / "b.engine").stat().st_mtime_ns
    done = run("--only", "b", **wrong)
    assert done.returncode == 1
    assert f"b: the plan is not as expected: {sentence}" in done.stdout
    assert (tmp_path / "out" / "b.engine").stat().st_mtime_ns == before


def test_an_inspector_that_writes_another_form(run: Run, tmp_path: Path) -> None:
    done = run("--only", "a", STUB_FORM="12")
    assert done.returncode == 1
    assert "EngineInspector must describe each layer in detail" in done.stdout
    done = run("--only", "a", "--plan", "warn", STUB_FORM="12")
    assert done.returncode == 0, done.stdout + done.stderr
    (warning,) = Manifest.load(tmp_path / "out").graph("a").extras["plan_warnings"]
    assert "this version of TensorRT writes it in another form" in warning
