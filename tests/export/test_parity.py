"""The reports on graphs and on a loop: their verdicts, and FP8 within twice the loss of bf16 from end to end."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from export.compare.denoising import run_eager, sample_request, verdict
from export.compare.one_graph import error_row
from export.graphs.recipe import Recipe
from export.parity import failures, loop_table
from export.parity import main as parity
from export.quantize.calibration import Calibration
from export.quantize.fp8 import Fp8
from export.quantize.measure import measure
from export.quantize.sensitivity import Effect, Sensitivity, globs, measure_sensitivity
from export.to_onnx import export_graphs
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.engine.manifest import LOOP, GraphEntry, GraphFile, Manifest
from stepvideo_serve.engine.spec import EngineSpec, TensorSpec
from stepvideo_serve.errors import ExportError
from tests.mini import normal

SIZES = {"steps": 3, "num_frames": 17, "height": 32, "width": 48}
NEEDED = ("dit_*", "step_llm", "hunyuan_clip", "vae_encoder")


def manifest(parity: list[dict[str, Any]], loop: Mapping[str, Any] | None) -> Manifest:
    spec = EngineSpec("one", (TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),), {})
    entry = GraphEntry((GraphFile("one.onnx", 1, "0"),), "key-1", spec, {"parity": parity})
    return Manifest("weights", "fp8", {}, {"one": entry}, {} if loop is None else {LOOP: dict(loop)})


ROW = {"output": "y", "error": 0.1, "allowed": 0.2, "rms": 0.01, "cosine": 0.999, "backend": "torch"}
STEP = {"error": 0.1, "rms": 0.02, "cosine": 0.9}
LOOP_OK = {
    "graphs": {"one": "key-1"},
    "steps": [{"graphs": STEP, "bf16": STEP}],
    "value": 1.5,
    "allowed": 2.0,
    "passed": True,
    "rule": "rule",
}


def test_errors_are_relative_to_the_largest_magnitude() -> None:
    reference = torch.tensor([3.0, -4.0])
    row = error_row(torch.tensor([3.0, -3.0]), reference)
    assert row["error"] == pytest.approx(1 / 4)
    assert row["rms"] == pytest.approx((1 / 2) ** 0.5 / 4)
    assert row["cosine"] == pytest.approx((9 + 12) / (18**0.5 * 5))
    assert error_row(reference, reference) == {"error": 0.0, "rms": 0.0, "cosine": pytest.approx(1.0)}


def test_low_precision_is_measured_by_bf16_and_fp32_by_itself() -> None:
    graphs, bf16 = {"error": 5e-5, "rms": 0.03}, {"error": 0.1, "rms": 0.02}
    assert verdict("fp32", graphs, bf16) | {"rule": ""} == {
        "value": 5e-5,
        "allowed": 1e-4,
        "passed": True,
        "rule": "",
    }
    assert verdict("fp8", graphs, bf16)["value"] == pytest.approx(1.5)
    assert verdict("fp8", graphs, bf16)["passed"] is True
    assert verdict("fp8", {"error": 0.1, "rms": 0.041}, bf16)["passed"] is False
    assert verdict("fp8", {"error": 0.1, "rms": float("nan")}, bf16)["passed"] is False


@pytest.mark.parametrize(
    ("rows", "loop", "expected"),
    [
        ([ROW], LOOP_OK, None),
        ([], LOOP_OK, "one has no parity report"),
        ([{**ROW, "error": 0.3}], LOOP_OK, "one is off by more"),
        ([ROW], None, "No loop has been compared"),
        ([ROW], {**LOOP_OK, "graphs": {"one": "key-0"}}, "compared with other graphs"),
        ([ROW], {**LOOP_OK, "passed": False, "value": 6.8}, "of at most 2, has 6.8"),
    ],
)
def test_what_is_missing_stale_or_failed_is_said(
    rows: list[dict[str, Any]], loop: Mapping[str, Any] | None, expected: str | None, tmp_path: Path
) -> None:
    found = manifest(rows, loop)
    assert [line for line in failures(found) if expected and expected in line] == failures(found)
    assert bool(failures(found)) == (expected is not None)
    found.save(tmp_path)
    assert parity(["--engines", str(tmp_path)]) == (0 if expected is None else 1)
    assert all(line in loop_table(found) for line in failures(found))


def test_wrong_folders_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity(["--engines", str(tmp_path)]) == 2
    manifest([ROW], None).save(tmp_path)
    assert parity(["--engines", str(tmp_path), "--model-dir", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_budget_is_shared_out_from_the_least_sensitive_on() -> None:
    effects = tuple(Effect(name, 0, rms, 1) for name, rms in (("a", 4.0), ("b", 2.0), ("c", 1.0), ("d", 0.5)))
    found = Sensitivity(effects, bf16_rms=1.0)
    assert found.keep(1.0) == ["a", "b", "c", "d"]
    assert found.keep(1.5) == ["a", "b"]  # 0.25 + 1 against 1.25
    assert found.keep(3.0) == ["a"]
    assert found.keep(5.0) == []
    with pytest.raises(ExportError, match="--budget must be at least 1"):
        found.keep(0.5)


def test_groups_of_layers(mini_checkpoint: Path) -> None:
    checkpoint = Checkpoint(mini_checkpoint)
    assert len(globs(checkpoint, "layer")) == 24
    assert globs(checkpoint, "block") == [
        f"{kind}.{i}.*" for kind in ("transformer_blocks", "transformer.layers") for i in (0, 1)
    ]
    assert len(globs(checkpoint, "kind")) == 8 + 4
    assert "transformer_blocks.*.ff.net.2" in globs(checkpoint, "kind")
    with pytest.raises(ExportError, match="--by must be one of"):
        globs(checkpoint, "net")


@pytest.fixture(scope="module")
def calibration(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    checkpoint = Checkpoint(mini_checkpoint)
    partial = tmp_path_factory.mktemp("calibration") / "partial"
    settings = {"precision": "fp32", "device": "cpu", "percentile": 100.0}
    return measure(checkpoint, {"one": sample_request(checkpoint, **SIZES)}, partial, settings, lambda: None)


@pytest.mark.slow
def test_fp8_from_end_to_end_loses_at_most_twice_what_bf16_does(
    mini_checkpoint: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """With the layers kept in bf16 that the sensitivity report names, on the very graphs that are compiled."""
    checkpoint = Checkpoint(mini_checkpoint)
    request = sample_request(checkpoint, **SIZES)
    found = measure_sensitivity(checkpoint, calibration, request, globs(checkpoint, "layer"), lambda: None)
    assert [effect.rms for effect in found.effects] == sorted((effect.rms for effect in found.effects), reverse=True)
    keep = found.keep(1.7)
    assert 0 < len(keep) < 24
    recipe = Recipe("fp8", Fp8(calibration, tuple(keep)))
    export_graphs(checkpoint, tmp_path, only=NEEDED, show_progress=False, recipe=recipe)
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    assert parity(["--engines", str(tmp_path), "--model-dir", str(mini_checkpoint), *sizes]) == 0
    loop = Manifest.load(tmp_path).extra[LOOP]
    assert len(loop["steps"]) == SIZES["steps"]
    assert 0.2 < loop["value"] <= loop["allowed"] == 2.0


def test_quantising_everything_loses_more_than_that_and_is_reported(
    mini_checkpoint: Path, calibration: Calibration
) -> None:
    checkpoint = Checkpoint(mini_checkpoint)
    request = sample_request(checkpoint, **SIZES)
    found = measure_sensitivity(checkpoint, calibration, request, ["transformer*"], lambda: None)
    loss = {"error": found.effects[0].error, "rms": found.effects[0].rms}
    said = verdict("fp8", loss, {"error": 1.0, "rms": found.bf16_rms})
    assert said["passed"] is False
    assert failures(manifest([ROW], {**LOOP_OK, **said})) == [
        f"The loop must have a {said['rule']} of at most 2, has {said['value']:.3g}."
    ]


def test_the_yardstick_itself(mini_checkpoint: Path) -> None:
    """torch in bf16 is off, and in fp32 it is not, so that a loop of the same latents twice proves nothing."""
    checkpoint = Checkpoint(mini_checkpoint)
    request = sample_request(checkpoint, **SIZES)
    first, again, bf16 = (run_eager(checkpoint, precision, request) for precision in ("fp32", "fp32", "bf16"))
    assert len(first) == SIZES["steps"]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert 1e-4 < error_row(bf16[-1], first[-1])["rms"] < 0.1
    assert error_row(normal(*first[-1].shape), first[-1])["rms"] > 0.1


def test_a_loop_with_graphs_that_do_not_run_here_is_refused(
    mini_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = manifest([ROW], None)
    entry = found.graphs["one"]
    plugin = replace(entry, extras={"ops": {"attention": {"implementation": "plugin"}}})
    replace(found, graphs={"step_llm": plugin, "hunyuan_clip": plugin}).save(tmp_path)
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    assert parity(["--engines", str(tmp_path), "--model-dir", str(mini_checkpoint), *sizes]) == 2
    assert "step_llm must be an ONNX graph of standard operators to run on a CPU" in capsys.readouterr().err
