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
from export.graphs.example_inputs import sample_inputs
from export.graphs.recipe import INPUT, Recipe
from export.tiny_checkpoint import write_checkpoint
from export.to_onnx import export_graphs
from stepvideo_serve.assembly import engines
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components
from stepvideo_serve.assembly.on_gpus import beside_graphs
from stepvideo_serve.assembly.runners import load_runners
from stepvideo_serve.assembly.stages import Denoiser, describe
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.engine.gpu_memory import free_memory
from stepvideo_serve.engine.manifest import KEY, EngineTarget, GraphEntry, Manifest
from stepvideo_serve.engine.nvinfer import LayerRunner
from stepvideo_serve.engine.runner import EagerRunner
from stepvideo_serve.engine.spec import Dim, WeightSpec
from stepvideo_serve.errors import EngineError, ExportError
from stepvideo_serve.parallel.layout import Layout
from tests.fakes.conftest import CONFIG
from tests.fakes.engines import SM, engine_entry, write_engines
from tests.fakes.machine import Machine, machine
from tests.fakes.tensorrt import VERSION
from tests.mini import MINI
from tests.parallel.sharded_ranks import make_job

TOKENS = Dim(min=3, opt=48, max=128)
RATIO = re.compile(r"\d ms with weights as inputs, +\d\S+ ms as constants, ratio \d+\.\d+$")


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
    assert verify.main([*given, "--constants", str(folder / "constants")]) == 0, capsys.readouterr()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if RATIO.search(line)] == ["dit_cross_00", "dit_block_00"]
    assert {line.split()[2] for line in lines if line.startswith("dit_block ")} == {"onnxruntime", "engine"}
    for name in ("dit_block", "dit_cross"):
        rows = Manifest.load(tmp_path / "engines").graph(name).extras["parity"]
        assert {(row["backend"], row["layer"]) for row in rows} == {
            (backend, layer) for backend in ("onnxruntime", "engine") for layer in (0, 1)
        }


def test_both_ways_with_slices(mini_checkpoint: Path, tmp_path: Path) -> None:
    """On the stub the figures mean nothing; that the engines of the first rank run both ways is what is shown."""
    for name, recipe, only in (
        ("shared", Recipe("fp32", compare=False, weights=INPUT), ["dit_ff"]),
        ("constants", Recipe("fp32", compare=False), ["dit_ff_00"]),
    ):
        graphs, out = tmp_path / f"{name}.onnx", tmp_path / name
        layout = Layout.parse("tp2")
        export_graphs(Checkpoint(mini_checkpoint), graphs, only=only, show_progress=False, layout=layout, recipe=recipe)
        for part in ("",) if name == "shared" else ("", "tp0of2"):
            narrow(graphs / part)
            write_engines(graphs / part, out / part, "single")
            manifest = Manifest.load(out / part)
            target = EngineTarget("tensorrt", VERSION, SM, "tp2", part).to_json()
            replace(manifest, extra={**manifest.extra, KEY: target}).save(out / part)
    shared, constants = tmp_path / "shared", tmp_path / "constants"
    with machine():
        [row] = time_both_ways(shared, constants, mini_checkpoint, None, gpu_opener)
        with pytest.raises(ExportError, match=r"must hold engines with the weights of .* inside"):
            time_both_ways(shared, shared, mini_checkpoint, None, gpu_opener)
    assert row.name == "dit_ff_00"
    assert RATIO.search(str(row))


def test_one_directory_serves_two_checkpoints(
    folder: Path, mini_checkpoint: Path, tmp_path: Path, gpu_machine: Machine
) -> None:
    """Two layers of each through one engine give what their networks give; a third checkpoint is refused."""
    shutil.copytree(folder / "onnx", tmp_path / "onnx")
    models = [mini_checkpoint, tmp_path / "second", tmp_path / "third"]
    for seed, model in enumerate(models[1:], 9):
        write_checkpoint(model, MINI, seed=seed)
    recipe = Recipe("fp32", weights=INPUT)
    only = ["dit_block"]
    export_graphs(Checkpoint(models[1]), tmp_path / "onnx", only=only, show_progress=False, recipe=recipe)
    write_engines(tmp_path / "onnx", tmp_path / "engines", "single")
    names, seen = ["dit_block_00", "dit_block_01"], list[torch.Tensor]()
    for model in models[:2]:
        table, config = components(Checkpoint(model), "fp32"), configured(tmp_path, model, "tensorrt")
        assert describe(config)["checkpoint"] == Checkpoint(model).identity
        for name, runner in load_runners(config, names, 1).items():
            inputs = sample_inputs(runner.spec, {"tokens": 40, "context_tokens": 90})
            found = runner(**{key: value.to("cuda") for key, value in inputs.items()})["tokens_out"].cpu()
            with EagerRunner(table[name].spec, table[name].load()) as eager:
                torch.testing.assert_close(found, eager(**inputs)["tokens_out"], rtol=1e-4, atol=1e-4)
            assert not any(torch.equal(found, other) for other in seen)
            seen.append(found)
    with pytest.raises(EngineError, match=r"a parity report for the weights \w+, found one for \w+, \w+: they are of"):
        load_runners(configured(tmp_path, models[2], "tensorrt"), names, 1)
    gpu_machine.gpu.check()


def test_weights_count_among_what_the_gpu_must_hold(
    folder: Path, mini_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks have 7.0 MiB of them, and nobody gives any memory back here."""
    monkeypatch.setattr(engines, "free_memory", partial(free_memory, patience_s=0.0))
    config = configured(folder, mini_checkpoint, "tensorrt")
    with machine(beside_graphs(config, "") + (6 << 20)), pytest.raises(EngineError, match="GiB for their weights"):
        load_runners(config, ["dit_block_00", "dit_block_01"], 1)


@pytest.fixture
def copied(folder: Path, mini_checkpoint: Path, tmp_path: Path) -> ServeConfig:
    """A configuration with engines of its own, to be spoiled."""
    shutil.copytree(folder / "engines", tmp_path / "engines")
    return configured(tmp_path, mini_checkpoint, "tensorrt")


def larger(entry: GraphEntry) -> tuple[GraphEntry, WeightSpec]:
    """The entry with its first weight twice as long, and that weight as it was."""
    weight = entry.spec.weights[0]
    other = replace(weight, tensor=replace(weight.tensor, shape=tuple(2 * size for size in weight.tensor.shape)))
    return replace(entry, spec=replace(entry.spec, weights=(other, *entry.spec.weights[1:]))), weight


def spoil(config: ServeConfig, name: str, entry: GraphEntry) -> None:
    manifest = Manifest.load(config.model.engines_dir)
    replace(manifest, graphs={**manifest.graphs, name: entry}).save(config.model.engines_dir)


def test_an_engine_of_another_shape_is_refused(copied: ServeConfig, folder: Path, gpu_machine: Machine) -> None:
    """By its manifest, which names the shapes of its weights; or by the engine itself, where the manifest does not tell
    the truth."""
    plain, free = Manifest.load(folder / "engines").graph("dit_cross"), gpu_machine.gpu.free_bytes
    entry, weight = larger(plain)
    shape, doubled = (re.escape(str(list(one.spec.weights[0].tensor.shape))) for one in (plain, entry))
    spoil(copied, "dit_cross", entry)
    told = rf'Engine dit_cross_00: weight "{re.escape(weight.name)}" must be float32 {doubled}, got float32 {shape}'
    with pytest.raises(EngineError, match=told):
        load_runners(copied, ["dit_cross_00"], 1)
    assert gpu_machine.gpu.free_bytes == free, "nothing was on the GPU"
    wrong = engine_entry(copied.model.engines_dir, folder / "onnx" / "dit_cross.onnx", entry)
    spoil(copied, "dit_cross", replace(wrong, spec=plain.spec))
    with pytest.raises(EngineError, match=rf'Engine dit_cross: weight ".*" must be float32 {shape}, found {doubled}'):
        load_runners(copied, ["dit_cross_00"], 1)


@pytest.mark.usefixtures("gpu_machine")
def test_an_engine_of_another_kind_is_refused(copied: ServeConfig) -> None:
    manifest = Manifest.load(copied.model.engines_dir)
    spoil(copied, "dit_block", replace(manifest.graph("dit_block"), files=manifest.graph("dit_cross").files))
    with pytest.raises(EngineError, match=r"Engine dit_block must have the tensors \[.*\], found \[.*\]"):
        load_runners(copied, ["dit_block_00"], 1)
