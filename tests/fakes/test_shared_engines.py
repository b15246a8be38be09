"""Engines that take their weights as inputs, on the stub: opened once for all layers, bound without a copy."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from export import verify
from export.compare.both_ways import time_both_ways
from export.compare.engines import gpu_opener
from export.graphs.recipe import INPUT, Recipe
from export.to_onnx import export_graphs
from stepvideo_serve.assembly import engines
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.runners import load_runners
from stepvideo_serve.assembly.stages import Denoiser
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.engine.gpu_memory import free_memory
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.engine.nvinfer import LayerRunner
from stepvideo_serve.engine.spec import Dim
from stepvideo_serve.errors import EngineError, ExportError
from stepvideo_serve.memory.ledger import RESERVED_BYTES
from tests.fakes.conftest import CONFIG
from tests.fakes.engines import write_engines
from tests.fakes.machine import Machine, machine
from tests.parallel.sharded_ranks import make_job

TOKENS = Dim(min=3, opt=48, max=128)


@pytest.fixture(scope="module")
def folder(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of two layers, and engines that name them; beside them those with the weights inside."""
    out = tmp_path_factory.mktemp("shared")
    recipe = Recipe("fp32", weights=INPUT)
    export_graphs(Checkpoint(mini_checkpoint), out / "onnx", only=["dit_*"], show_progress=False, recipe=recipe)
    narrow(out / "onnx")
    write_engines(out / "onnx", out / "engines", "single")
    plain = Recipe("fp32", compare=False)
    only = ["dit_block_00", "dit_cross_00"]
    export_graphs(Checkpoint(mini_checkpoint), out / "plain", only=only, show_progress=False, recipe=plain)
    narrow(out / "plain")
    write_engines(out / "plain", out / "constants", "single")
    return out


def narrow(folder: Path) -> None:
    """Few tokens, as a build for small videos leaves them: those of the published model take a CPU minutes."""
    manifest = Manifest.load(folder)
    specs = {name: entry.spec for name, entry in manifest.graphs.items()}
    few = {
        name: replace(spec, dims={**spec.dims, **({"tokens": TOKENS} if "tokens" in spec.dims else {})})
        for name, spec in specs.items()
    }
    graphs = {name: replace(entry, spec=few[name]) for name, entry in manifest.graphs.items()}
    replace(manifest, graphs=graphs).save(folder)


@pytest.fixture
def gpu_machine() -> Iterator[Machine]:
    with machine() as made:
        yield made


def configured(folder: Path, model: Path, backend: str) -> ServeConfig:
    directory, device = ("engines", "cuda") if backend == "tensorrt" else ("onnx", "cpu")
    values = {"model": model, "engines": folder / directory, "backend": backend, "device": device}
    path = folder / f"{backend}.toml"
    path.write_text(CONFIG.format(layout="single", **values))
    return ServeConfig.load(path)


def test_layers_compute_what_onnx_runtime_does(folder: Path, mini_checkpoint: Path, gpu_machine: Machine) -> None:
    """The same graphs and weights, whatever layer ran before on the same engine; products with weights that are inputs
    add up in another order than those with constants, which ONNX Runtime packs."""
    job = make_job()
    found, expected = (Denoiser(configured(folder, mini_checkpoint, backend)) for backend in ("tensorrt", "ort"))
    for ours, theirs in zip(found.run(job), expected.run(job), strict=True):
        assert ours.latents is not None
        assert theirs.latents is not None
        torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-4, atol=1e-4)
    gpu_machine.gpu.check()


def test_an_engine_is_opened_once_and_weights_are_bound_where_they_lie(
    folder: Path, mini_checkpoint: Path, gpu_machine: Machine
) -> None:
    config = configured(folder, mini_checkpoint, "tensorrt")
    first, second = load_runners(config, ["dit_block_00", "dit_block_01"], 1).values()
    assert isinstance(first, LayerRunner)
    assert isinstance(second, LayerRunner)
    assert first._engine is second._engine
    assert first._context is second._context
    inputs = {
        tensor.name: torch.randn(tensor.resolve({"tokens": 40, "context_tokens": 90})).to("cuda")
        for tensor in first.spec.inputs
    }
    outputs = [runner(**inputs)["tokens_out"].cpu() for runner in (first, second, first)]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    before = gpu_machine.gpu.free_bytes
    first(**inputs)
    assert gpu_machine.gpu.free_bytes == before


@pytest.mark.usefixtures("gpu_machine")
def test_verify_compares_every_layer(
    folder: Path, mini_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "engines", tmp_path / "engines")
    given = ["--engines", str(tmp_path / "engines"), "--gpu", "--model-dir", str(mini_checkpoint)]
    assert verify.main(given) == 0, capsys.readouterr()
    for name in ("dit_block", "dit_cross"):
        rows = Manifest.load(tmp_path / "engines").graph(name).extras["parity"]
        assert {(row["backend"], row["layer"]) for row in rows} == {
            (backend, layer) for backend in ("onnxruntime", "engine") for layer in (0, 1)
        }


@pytest.mark.usefixtures("gpu_machine")
def test_verify_times_both_ways(folder: Path, mini_checkpoint: Path) -> None:
    """On the stub the figures mean nothing; that both engines of a kind run is what is shown."""
    found = time_both_ways(folder / "engines", folder / "constants", mini_checkpoint, None, gpu_opener)
    assert [row.name for row in found] == ["dit_cross_00", "dit_block_00"]
    assert all(re.search(r"ms with weights as inputs, .* ms as constants, ratio \d+\.\d+", str(row)) for row in found)
    with pytest.raises(ExportError, match=r"must hold engines with the weights of .* inside"):
        time_both_ways(folder / "engines", folder / "engines", mini_checkpoint, None, gpu_opener)


def test_weights_count_among_what_the_gpu_must_hold(
    folder: Path, mini_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks have 7.0 MiB of them, and nobody gives any memory back here."""
    monkeypatch.setattr(engines, "free_memory", partial(free_memory, patience_s=0.0))
    config = configured(folder, mini_checkpoint, "tensorrt")
    with machine(RESERVED_BYTES + (6 << 20)), pytest.raises(EngineError, match="GiB for their weights"):
        load_runners(config, ["dit_block_00", "dit_block_01"], 1)


def test_an_engine_of_another_shape_is_refused(folder: Path, mini_checkpoint: Path, tmp_path: Path) -> None:
    """Its manifest names the shapes of its weights."""
    manifest = Manifest.load(folder / "engines")
    entry = manifest.graph("dit_cross_00")
    weight = entry.spec.weights[0]
    larger = replace(weight, tensor=replace(weight.tensor, shape=tuple(2 * size for size in weight.tensor.shape)))
    spec = replace(entry.spec, weights=(larger, *entry.spec.weights[1:]))
    config = configured(folder, mini_checkpoint, "tensorrt")
    (tmp_path / "engines").mkdir()
    for path in (folder / "engines").glob("*.engine"):
        (tmp_path / "engines" / path.name).write_bytes(path.read_bytes())
    replace(manifest, graphs={**manifest.graphs, "dit_cross": replace(entry, spec=spec)}).save(tmp_path / "engines")
    other = replace(config, model=replace(config.model, engines_dir=tmp_path / "engines"))
    with (
        machine(),
        pytest.raises(EngineError, match=r'Engine dit_block_00: weight ".*" must be .*, found \[.*\]|must be'),
    ):
        load_runners(other, ["dit_cross_00"], 1)
