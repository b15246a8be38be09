"""The FP8 weight set: what graphs of a kind get from it, that it is made once, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export.graphs.recipe import INPUT, Recipe
from export.graphs.shared import plan_shared
from export.graphs.weight_inputs import values_of, with_weights
from export.quantize.__main__ import main
from export.tiny_checkpoint import write_checkpoint
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.layer_weights import LayerWeights
from stepvideo_serve.engine.manifest import GraphEntry, GraphFile, Manifest
from stepvideo_serve.engine.parity import WEIGHTS
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import CheckpointError, EngineError
from stepvideo_serve.fused.fp8 import FP8
from stepvideo_serve.parallel.layout import SINGLE, Layout
from stepvideo_serve.weights.cuts import TensorPart
from stepvideo_serve.weights.files import file_digest
from stepvideo_serve.weights.weight_set import FILE_NAME, WeightSet
from tests.export.calibrated import calibrated
from tests.mini import MINI

KEPT = "transformer_blocks.1.attn1.core"


@pytest.fixture(scope="module")
def calibration(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    calibrated(mini_checkpoint).calibration.save(path)
    return path


@pytest.fixture(scope="module")
def made(mini_checkpoint: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set") / "fp8"
    assert quantize(mini_checkpoint, calibration, out) == 0
    return out


def quantize(model: Path, calibration: Path, out: Path, *options: str) -> int:
    given = ["--model-dir", str(model), "--calibration", str(calibration), "--out", str(out), "--quiet", *options]
    return main(given)


def spec_and_values(model: Path, name: str, layout: Layout = SINGLE) -> tuple[EngineSpec, dict[str, torch.Tensor]]:
    """What the export makes of one layer of the first rank, quantised in torch."""
    checkpoint, recipe = Checkpoint(model), Recipe("fp8", calibrated(model), weights=INPUT)
    component = plan_shared(checkpoint, recipe, layout, split_llm=layout.tp > 1).versions(name)[0]
    module = recipe.build_shared(component, checkpoint).module
    spec = with_weights(component, module, checkpoint, layout.tp)
    return spec, values_of(module, spec)


@pytest.mark.parametrize("name", ["dit_block_01", "dit_cross_00", "step_llm_layer_01"])
def test_a_graph_gets_the_weights_that_it_was_compared_with(mini_checkpoint: Path, made: Path, name: str) -> None:
    spec, expected = spec_and_values(mini_checkpoint, name)
    found = LayerWeights(Checkpoint(mini_checkpoint), weight_set=WeightSet.load(made)).of(name, spec)
    assert found.keys() == expected.keys()
    for weight, value in expected.items():
        assert torch.equal(found[weight].view(torch.uint8), value.view(torch.uint8)), weight


@pytest.mark.parametrize("name", ["dit_attn_00", "dit_ff_01", "step_llm_attn_00", "step_llm_ff_01"])
def test_ranks_get_their_rows_and_columns(mini_checkpoint: Path, made: Path, name: str) -> None:
    """Both slices together are the whole: codes along the axis of the cut, scales of rows with them."""
    checkpoint, weight_set = Checkpoint(mini_checkpoint), WeightSet.load(made)
    spec, _ = spec_and_values(mini_checkpoint, name, Layout.parse("tp2"))
    halves = [LayerWeights(checkpoint, TensorPart(index, 2), weight_set).of(name, spec) for index in range(2)]
    cut = 0
    for weight in spec.weights:
        parts = [half[weight.name].float() for half in halves]
        if weight.axis is None:
            assert torch.equal(*parts)
            continue
        if weight.form != "codes":
            continue
        key = weight.key_of(int(name[-2:])).removesuffix(".weight")
        whole = weight_set.read(f"{key}.codes").float()
        joined = torch.cat(parts, weight.axis)
        assert torch.equal(joined.sort(weight.axis).values, whole.sort(weight.axis).values), weight.name
        cut += 1
    assert cut


def test_products_keep_what_the_format_allows(mini_checkpoint: Path, made: Path) -> None:
    """code * scale is the weight up to the rounding of E4M3, and all scales are powers of two."""
    name = "transformer_blocks.0.ff.net.2"
    weight_set = WeightSet.load(made)
    codes, scale, inverse = (
        weight_set.read(f"{name}.{part}").float() for part in ("codes", "output_scale", "input_inverse")
    )
    weight = Checkpoint(mini_checkpoint).tensors("dit", [f"{name}.weight"], torch.float32)[f"{name}.weight"]
    of_row = (scale * inverse)[:, None]
    assert ((codes * of_row - weight).abs() <= torch.maximum(2**-4 * weight.abs(), 2**-10 * of_row)).all()
    assert (scale.log2() == scale.log2().round()).all()


def test_an_interrupted_run_goes_on(mini_checkpoint: Path, calibration: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "fp8"
    shutil.copytree(made, out)
    (out / "transformer_blocks.01.safetensors").unlink()
    data = json.loads((out / FILE_NAME).read_text())
    del data["shards"]["transformer_blocks.01.safetensors"]
    (out / FILE_NAME).write_text(json.dumps(data))
    before = (out / "transformer_blocks.00.safetensors").stat().st_mtime_ns
    assert quantize(mini_checkpoint, calibration, out) == 0
    assert (out / "transformer_blocks.00.safetensors").stat().st_mtime_ns == before
    assert WeightSet.load(out).to_json() == WeightSet.load(made).to_json()


def test_layers_that_are_kept_are_not_in_it(mini_checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    assert quantize(mini_checkpoint, calibration, tmp_path, "--keep-bf16", KEPT) == 0
    with safe_open(tmp_path / "transformer_blocks.01.safetensors", "pt") as file:
        names = set(file.keys())
    assert "transformer_blocks.1.attn1.wqkv.codes" in names
    assert not any(name.startswith(KEPT) for name in names)
    spec, _ = spec_and_values(mini_checkpoint, "dit_block_01")
    weights = LayerWeights(Checkpoint(mini_checkpoint), weight_set=WeightSet.load(tmp_path))
    with pytest.raises(CheckpointError, match=rf"must hold {KEPT}\.value_scale, it does not: make the set again"):
        weights.of("dit_block_01", spec)


def test_a_truncated_shard_is_one_sentence(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "fp8"
    shutil.copytree(made, out)
    shard = out / "transformer.layers.00.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"transformer\.layers\.00\.safetensors must have \d+ bytes, found \d+"):
        WeightSet.load(out)
    shard.unlink()
    with pytest.raises(CheckpointError, match="must be a shard of the weight set, No such file"):
        WeightSet.load(out)


def test_without_a_set_an_fp8_engine_is_refused(mini_checkpoint: Path) -> None:
    spec, _ = spec_and_values(mini_checkpoint, "dit_cross_00")
    with pytest.raises(EngineError, match=r"takes quantised weights .*, \[model\] weight_set names none: make a set"):
        LayerWeights(Checkpoint(mini_checkpoint)).of("dit_cross_00", spec)


def test_a_set_of_another_checkpoint_is_refused(mini_checkpoint: Path, made: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", MINI, seed=9)
    weights = LayerWeights(Checkpoint(tmp_path / "other"), weight_set=WeightSet.load(made))
    with pytest.raises(
        CheckpointError, match=r"The weight set in .* must be of .* \(dit: \w{12}\), found one of \w{12}"
    ):
        weights.identity("dit_cross_00")
    assert LayerWeights(Checkpoint(mini_checkpoint), weight_set=WeightSet.load(made)).identity("dit_cross_00")


def reported(spec: EngineSpec, *weights: str) -> Manifest:
    """Of dit_cross, compared with these weights."""
    rows = [{"layer": 0, "output": "cross_k", "error": 0.0, "allowed": 1.0, WEIGHTS: one} for one in weights]
    entry = GraphEntry((GraphFile("x", 1, ""),), "", spec, {"layers": [0], "parity": rows})
    return Manifest("", "fp8", {}, {"dit_cross": entry})


def refused_before_loading(model: Path, folder: Path, manifest: Manifest) -> None:
    """Asks for the weights as a server does; `checked` raises before its block begins, or in the end."""
    weights = LayerWeights(Checkpoint(model), weight_set=WeightSet.load(folder))
    with weights.checked(manifest, ["dit_cross_00"], file_digest):
        pytest.fail("nothing may be loaded")


def test_a_set_of_another_calibration_is_refused(mini_checkpoint: Path, made: Path, tmp_path: Path) -> None:
    """By its parity report an engine knows which weights it may have, by its manifest a set which they are."""
    spec, _ = spec_and_values(mini_checkpoint, "dit_cross_00")
    ours = LayerWeights(Checkpoint(mini_checkpoint), weight_set=WeightSet.load(made))
    manifest = reported(spec, ours.identity("dit_cross_00"))
    with ours.checked(manifest, ["dit_cross_00"], file_digest):
        pass
    calibration = tmp_path / "calibration.json"
    calibrated(mini_checkpoint, amax=7.0).calibration.save(calibration)
    assert quantize(mini_checkpoint, calibration, tmp_path / "fp8") == 0
    with pytest.raises(
        EngineError, match=r"must have a parity report for the weights \w+, found one for \w+: they are"
    ):
        refused_before_loading(mini_checkpoint, tmp_path / "fp8", manifest)


def test_a_shard_that_was_exchanged_is_refused(mini_checkpoint: Path, made: Path, tmp_path: Path) -> None:
    """Hashes are computed beside the loading: the server hears in the end, before it is ready."""
    spec, _ = spec_and_values(mini_checkpoint, "dit_cross_00")
    shutil.copytree(made, tmp_path / "fp8")
    shard = tmp_path / "fp8" / "transformer_blocks.00.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    weights = LayerWeights(Checkpoint(mini_checkpoint), weight_set=WeightSet.load(tmp_path / "fp8"))
    manifest, loaded = reported(spec, WeightSet.load(made).identity("dit")), []
    with (
        pytest.raises(CheckpointError, match=r"transformer_blocks\.00\.safetensors must have SHA-256 \w+, found"),
        weights.checked(manifest, ["dit_cross_00"], file_digest),
    ):
        loaded.append("dit_cross_00")
    assert loaded


def exchanged(made: Path, out: Path, name: str, changed: torch.Tensor | None) -> Path:
    """A copy of the set with one tensor changed or left out, whose manifest has the new shard's size and hash."""
    shutil.copytree(made, out)
    data = json.loads((out / FILE_NAME).read_text())
    file, shard = next((file, one) for file, one in data["shards"].items() if name in one["tensors"])
    tensors = load_file(out / file)
    tensors = {key: value for key, value in tensors.items() if key != name}
    save_file(tensors | ({} if changed is None else {name: changed}), out / file)
    shard |= {"size_bytes": (out / file).stat().st_size, "sha256": file_digest(out / file)}
    (out / FILE_NAME).write_text(json.dumps(data))
    return out


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        (None, CheckpointError, r"transformer_blocks\.00\.safetensors must hold .*\.codes, it does not: make the set"),
        (torch.zeros(4, 256), EngineError, r'weight "\S+" must be float8_e4m3fn \[512, 256\], got .* \[4, 256\]: the'),
    ],
    ids=["missing", "misshaped"],
)
def test_a_tensor_that_is_missing_or_misshaped_is_refused(
    mini_checkpoint: Path,
    made: Path,
    tmp_path: Path,
    changed: torch.Tensor | None,
    error: type[Exception],
    sentence: str,
) -> None:
    spec, _ = spec_and_values(mini_checkpoint, "dit_cross_00")
    name = "transformer_blocks.0.attn2.wkv.codes"
    folder = exchanged(made, tmp_path / "fp8", name, None if changed is None else changed.to(FP8))
    with pytest.raises(error, match=sentence):
        refused_before_loading(mini_checkpoint, folder, reported(spec, WeightSet.load(folder).identity("dit")))


def test_only_a_set_that_the_configuration_names_is_read(made: Path) -> None:
    digest = file_digest(made / FILE_NAME)
    assert WeightSet.load(made, (digest, "0" * 64)).shards
    with pytest.raises(
        CheckpointError, match=rf"weights\.json must be a manifest that \[model\] manifests names, found .* {digest}"
    ):
        WeightSet.load(made, ("0" * 64,))


def test_a_calibration_of_another_checkpoint_is_refused(
    calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "other", MINI, seed=9)
    assert quantize(tmp_path / "other", calibration, tmp_path / "fp8") == 2
    assert "The calibration must be of" in capsys.readouterr().err
    assert not (tmp_path / "fp8").exists()
