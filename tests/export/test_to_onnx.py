"""The export: complete, checked, resumable, and one sentence for whatever is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from export.tiny_checkpoint import write_checkpoint
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components
from stepvideo_serve.engine.manifest import Manifest

CHEAP = ("dit_context", "dit_final")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx")
    assert run(checkpoint, out).returncode == 0
    return out


def run(model_dir: Path, out: Path, *options: str, only: tuple[str, ...] = CHEAP) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export.to_onnx", "--model-dir", str(model_dir), "--out", str(out), "--quiet"]
    return subprocess.run(
        [*command, "--only", *only, *options], capture_output=True, text=True, check=False, timeout=300
    )


def test_a_graph_is_recorded_with_its_parity_at_two_shapes(exported: Path) -> None:
    manifest = Manifest.load(exported)
    assert set(manifest.graphs) == set(CHEAP)
    manifest.verify(exported, hashes=True)
    for entry in manifest.graphs.values():
        rows = entry.extras["parity"]
        assert len({json.dumps(row["sizes"]) for row in rows}) == 2
        assert all(0 <= row["error"] <= 2e-5 for row in rows)
        onnx.checker.check_model(str(exported / entry.file), full_check=True)
    assert len(manifest.extra["preview"]["bias"]) == 3


def test_weights_lie_outside_the_graph_file(exported: Path) -> None:
    assert (exported / "dit_context.onnx.data").stat().st_size > (exported / "dit_context.onnx").stat().st_size


def test_run_again_it_builds_only_what_is_missing_or_stale(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    shutil.copytree(exported, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.onnx")}
    (out / "dit_final.onnx.data").write_bytes(b"cut short")
    (out / ".dit_final.partial").mkdir()  # what a killed run leaves
    assert run(checkpoint, out).returncode == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.onnx")}
    assert after["dit_context.onnx"] == before["dit_context.onnx"]
    assert after["dit_final.onnx"] != before["dit_final.onnx"]
    assert not (out / ".dit_final.partial").exists()
    Manifest.load(out).verify(out, hashes=True)


def test_changed_weights_make_their_graphs_stale(exported: Path, tmp_path: Path) -> None:
    out, changed = tmp_path / "onnx", tmp_path / "model"
    shutil.copytree(exported, out)
    write_checkpoint(changed, seed=8)
    assert run(changed, out, only=("dit_final",)).returncode == 0
    old, new = Manifest.load(exported), Manifest.load(out)
    assert new.checkpoint != old.checkpoint
    assert new.graphs["dit_final"].key != old.graphs["dit_final"].key
    assert new.graphs["dit_context"].key == old.graphs["dit_context"].key


def test_half_precision_loses_no_more_than_twice_what_torch_does(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, tmp_path, "--precision", "fp16", only=("dit_block_00",))
    assert done.returncode == 0, done.stderr
    entry = Manifest.load(tmp_path).graphs["dit_block_00"]
    assert entry.spec.inputs[0].dtype == "float16"
    assert all(0 < row["error"] <= row["allowed"] for row in entry.extras["parity"])


def test_bf16_graphs_are_compared_as_their_fp16_twin(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, tmp_path, "--precision", "bf16")
    assert done.returncode == 0, done.stderr
    graph = onnx.load(tmp_path / "dit_final.onnx", load_external_data=False)
    assert graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    for entry in Manifest.load(tmp_path).graphs.values():
        assert all(0 < row["error"] <= row["allowed"] < 0.01 for row in entry.extras["parity"])
    assert not list(tmp_path.glob("*twin*"))


def test_an_export_without_comparison_has_no_report_until_one_with(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, tmp_path, "--no-compare", only=("dit_final",))
    assert done.returncode == 0, done.stderr
    assert "not compared" in done.stdout
    assert Manifest.load(tmp_path).graphs["dit_final"].extras["parity"] == []
    assert run(checkpoint, tmp_path, only=("dit_final",)).returncode == 0
    assert Manifest.load(tmp_path).graphs["dit_final"].extras["parity"]


@pytest.mark.parametrize(
    ("options", "only", "expected"),
    [
        ((), ("nonsense*",), "--only must match at least one graph"),
        (("--precision", "fp16"), CHEAP, "must hold graphs in fp16, found fp32"),
    ],
)
def test_bad_options_are_one_sentence(
    checkpoint: Path, exported: Path, options: tuple[str, ...], only: tuple[str, ...], expected: str
) -> None:
    done = run(checkpoint, exported, *options, only=only)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(checkpoint, broken)
    shard = sorted((broken / "transformer").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    done = run(broken, tmp_path / "onnx")
    assert done.returncode == 2
    assert shard.name in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere", tmp_path / "onnx")
    assert done.returncode == 2
    assert "must exist" in done.stderr


def test_every_graph_of_the_design_is_there(checkpoint: Path) -> None:
    names = list(components(Checkpoint(checkpoint), "fp32"))
    layers = Checkpoint(checkpoint).dit_config.num_layers
    per_layer = [f"dit_{kind}_{i:02d}" for kind in ("cross", "block") for i in range(layers)]
    whole = ["step_llm", "hunyuan_clip", "vae_encoder", "vae_decoder", "dit_context", "dit_embed", "dit_final"]
    assert sorted(names) == sorted(whole + per_layer)
