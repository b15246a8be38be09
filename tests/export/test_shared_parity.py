"""Parity of graphs whose weights are inputs: a report on the loop for each set of weights, and who is refused by it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export.compare.denoising import sample_request
from export.goldens.networks import open_networks
from export.graphs.example_inputs import LARGE_SIZES, sample_inputs
from export.graphs.recipe import INPUT, Recipe
from export.parity import loop_failures
from export.parity import main as parity
from export.quantize.__main__ import main as quantize
from export.quantize.calibration import Calibration
from export.quantize.fp8 import Fp8
from export.quantize.measure import measure
from export.quantize.sensitivity import globs, measure_sensitivity
from export.sensitivity import main as sensitivity
from export.tiny_checkpoint import write_checkpoint
from export.to_onnx import export_graphs
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components
from stepvideo_serve.assembly.layer_weights import LayerWeights
from stepvideo_serve.engine.manifest import LOOP, Manifest
from stepvideo_serve.engine.parity import WEIGHTS, require_parity
from stepvideo_serve.engine.runner import EagerRunner
from stepvideo_serve.errors import EngineError
from tests.export.calibrated import calibrated
from tests.mini import MINI

SIZES = {"steps": 2, "num_frames": 17, "height": 32, "width": 48}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
NEEDED = ["dit_*", "step_llm*", "hunyuan_clip", "vae_encoder"]


@pytest.fixture(scope="module")
def other(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the same Video-VAE, whose weights are in its graphs."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    write_checkpoint(folder, MINI, seed=9)
    shutil.rmtree(folder / "vae")
    shutil.copytree(mini_checkpoint / "vae", folder / "vae")
    return folder


@pytest.fixture(scope="module")
def graphs(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp32; not compared one by one, since the loop is what is looked at."""
    out = tmp_path_factory.mktemp("graphs")
    recipe = Recipe("fp32", compare=False, weights=INPUT)
    export_graphs(Checkpoint(mini_checkpoint), out, only=NEEDED, show_progress=False, recipe=recipe)
    return out


def loop_of(graphs: Path, model: Path, *options: str) -> int:
    return parity(["--engines", str(graphs), "--model-dir", str(model), *OPTIONS, *options])


def test_each_checkpoint_has_a_report_of_its_own(
    graphs: Path, mini_checkpoint: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same graphs with the weights of two; run again, a report takes the place of its own."""
    for model in (mini_checkpoint, other, mini_checkpoint):
        loop_of(graphs, model)
    manifest = Manifest.load(graphs)
    loops = manifest.extra[LOOP]
    assert loop_failures(manifest) == []
    assert [loop["passed"] for loop in loops] == [True, True]
    assert all(0 < loop["value"] < 1e-4 for loop in loops)
    takers = {name for name, entry in manifest.graphs.items() if entry.spec.weights}
    assert [loop[WEIGHTS].keys() for loop in loops] == [takers, takers]
    for loop, model in zip(loops, (other, mini_checkpoint), strict=True):
        weights = LayerWeights(Checkpoint(model))
        assert loop[WEIGHTS] == {name: weights.identity(name) for name in takers}
    assert f"with the weights {', '.join(sorted(set(loops[1][WEIGHTS].values())))}: " in capsys.readouterr().out


def test_a_loop_that_failed_counts_for_its_own_weights(graphs: Path, mini_checkpoint: Path, other: Path) -> None:
    """A process knows the weights of its part of the model; where they passed with others of another part, they may."""
    loop_of(graphs, mini_checkpoint)
    manifest = Manifest.load(graphs)
    rows = {"parity": [{"output": "y", "error": 0.0, "allowed": 1.0}]}
    compared = {name: replace(one, extras={**one.extras, **rows}) for name, one in manifest.graphs.items()}
    loop = next(one for one in manifest.extra[LOOP] if one[WEIGHTS] == identities(manifest, mini_checkpoint))
    failed = {**loop, "passed": False, "value": 6.8}
    found = replace(manifest, graphs=compared, extra={**manifest.extra, LOOP: [failed]})
    ours, theirs = ({"dit_block_01": identities(found, model)["dit_block"]} for model in (mini_checkpoint, other))
    with pytest.raises(EngineError, match=r"their report has 6\.8: keep more layers"):
        require_parity(found, ours, ours)
    require_parity(found, theirs, theirs)
    require_parity(found, ours)  # whose weights are not known yet
    with_other_text = {**loop, WEIGHTS: {**loop[WEIGHTS], "step_llm_embed": "0" * 16}}
    require_parity(replace(found, extra={LOOP: [failed, with_other_text]}), ours, ours)


def identities(manifest: Manifest, model: Path) -> dict[str, str]:
    weights = LayerWeights(Checkpoint(model))
    return {name: weights.identity(name) for name, entry in manifest.graphs.items() if entry.spec.weights}


def test_another_export_keeps_the_reports(graphs: Path, mini_checkpoint: Path, other: Path) -> None:
    loop_of(graphs, mini_checkpoint)
    before = Manifest.load(graphs).extra[LOOP]
    recipe = Recipe("fp32", compare=False, weights=INPUT)
    export_graphs(Checkpoint(other), graphs, only=["dit_final"], show_progress=False, recipe=recipe)
    assert Manifest.load(graphs).extra[LOOP] == before


def test_goldens_are_recomputed_on_such_graphs(graphs: Path, other: Path) -> None:
    """By the weights of the checkpoint that is named, whichever the graphs were made from."""
    with open_networks(other, "ort", graphs) as networks:
        for name in ("step_llm", "dit_block_01", "hunyuan_clip"):
            runner, component = networks.graph(name), components(Checkpoint(other), "fp32")[name]
            inputs = sample_inputs(component.spec, LARGE_SIZES, seed=3)
            found = runner(**inputs)
            with EagerRunner(component.spec, component.load()) as eager:
                for output, value in eager(**inputs).items():
                    torch.testing.assert_close(found[output], value, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def calibration(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, folder = Checkpoint(mini_checkpoint), tmp_path_factory.mktemp("calibration")
    settings = {"precision": "fp32", "device": "cpu", "percentile": 100.0}
    requests = {"one": sample_request(checkpoint, **SIZES)}
    found = measure(checkpoint, requests, folder / "partial", settings, lambda: None)
    found.save(folder / "calibration.json")
    return folder / "calibration.json"


@pytest.mark.slow
def test_fp8_from_end_to_end_loses_at_most_twice_what_bf16_does(
    mini_checkpoint: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calibration, sensitivity, weight set, graphs and loop. The weights are those of the set: without it, or with one
    of another calibration, there is nothing to run or another result."""
    checkpoint, found = Checkpoint(mini_checkpoint), Calibration.load(calibration)
    ranked = measure_sensitivity(
        checkpoint,
        found,
        sample_request(checkpoint, **SIZES),
        globs(checkpoint, "layer"),
        lambda: None,
        weights_outside=True,
    )
    keep = ranked.keep(1.7)
    assert 0 < len(keep) < len(ranked.effects)
    recipe = Recipe("fp8", Fp8(found, tuple(keep)), weights=INPUT)
    export_graphs(checkpoint, tmp_path / "onnx", only=NEEDED, show_progress=False, recipe=recipe)
    given = ["--model-dir", str(mini_checkpoint), "--calibration", str(calibration), "--out", str(tmp_path / "fp8")]
    assert quantize([*given, "--quiet", "--keep-bf16", *keep]) == 0
    assert loop_of(tmp_path / "onnx", mini_checkpoint, "--weight-set", str(tmp_path / "fp8")) == 0
    [loop] = Manifest.load(tmp_path / "onnx").extra[LOOP]
    assert 0.2 < loop["value"] <= loop["allowed"] == 2.0
    rows = Manifest.load(tmp_path / "onnx").graph("dit_block_00").extras["parity"]
    assert {row[WEIGHTS] for row in rows} == {loop[WEIGHTS]["dit_block"]}
    shard = tmp_path / "fp8" / "transformer_blocks.00.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert loop_of(tmp_path / "onnx", mini_checkpoint, "--weight-set", str(tmp_path / "fp8")) == 2
    assert "transformer_blocks.00.safetensors must have SHA-256" in capsys.readouterr().err


def test_weights_that_do_not_belong_are_one_sentence(
    graphs: Path, mini_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loop_of(graphs, mini_checkpoint, "--weight-set", str(tmp_path)) == 2
    assert (
        "--weight-set goes with FP8 graphs that take their weights as inputs, got one with fp32"
        in capsys.readouterr().err
    )
    shutil.copytree(graphs, tmp_path / "onnx")
    data = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
    (tmp_path / "onnx" / "manifest.json").write_text(json.dumps({**data, "precision": "fp8"}))
    assert loop_of(tmp_path / "onnx", mini_checkpoint) == 2
    assert "got none: make it with python -m export.quantize" in capsys.readouterr().err
    path = tmp_path / "calibration.json"
    calibrated(mini_checkpoint).calibration.save(path)
    given = ["--model-dir", str(mini_checkpoint), "--calibration", str(path), "--quiet"]
    assert sensitivity([*given, "--precision", "nvfp4", "--weights", "input"]) == 2
    assert "constant with --precision nvfp4" in capsys.readouterr().err
