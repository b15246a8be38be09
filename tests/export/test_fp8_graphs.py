"""FP8 graphs: what is in them, that they compute what torch computes, when they are stale, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from torch import Tensor

from export.compare.fp16_copy import twin_spec, write_fp16_twin
from export.graphs.recipe import Recipe
from export.quantize.calibration import PARTS, Calibration
from export.quantize.fp8 import Fp8
from export.quantize.weights import check_weights
from export.tiny_checkpoint import write_checkpoint
from export.to_onnx import export_graphs, main
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.errors import ExportError
from stepvideo_serve.fused.layers import all_names
from stepvideo_serve.parallel.layout import Layout
from tests.mini import MINI

FP8 = onnx.TensorProto.FLOAT8E4M3FN
GRAPHS = ("dit_block_00", "dit_cross_00", "dit_final")


def calibrate(checkpoint: Checkpoint, amax: float = 6.0) -> Calibration:
    """The same range for every tensor, wide enough for the random inputs of a comparison."""
    names = [n for n in all_names(checkpoint.dit_config, checkpoint.llm_config) if not n.endswith("core")]
    names += [
        f"{n}.{operand}"
        for n in all_names(checkpoint.dit_config, checkpoint.llm_config)
        if n.endswith("core")
        for operand in "qkv"
    ]
    return Calibration({p: checkpoint.digest(p) for p in PARTS}, {"steps": 1}, dict.fromkeys(names, amax))


@pytest.fixture(scope="module")
def calibration(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    calibrate(Checkpoint(mini_checkpoint)).save(path)
    return path


@pytest.fixture(scope="module")
def exported(mini_checkpoint: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8")
    assert run(mini_checkpoint, out, "--precision", "fp8", "--calibration", str(calibration)) == 0
    return out


def run(model: Path, out: Path, *options: str, only: tuple[str, ...] = GRAPHS) -> int:
    return main(["--model-dir", str(model), "--out", str(out), "--quiet", "--only", *only, *options])


def graph(folder: Path, name: str) -> onnx.GraphProto:
    return onnx.load(str(folder / f"{name}.onnx")).graph


def test_the_manifest_says_what_is_quantised(exported: Path) -> None:
    manifest = Manifest.load(exported)
    assert manifest.precision == "fp8"
    assert manifest.extra["fp8"] == {"keep_bf16": [], "calibration": {"steps": 1}}
    counts = {name: entry.extras["fp8"] for name, entry in manifest.graphs.items()}
    assert counts == {
        "dit_block_00": {"linears": 6, "attentions": 1},
        "dit_cross_00": {"linears": 1, "attentions": 0},
        "dit_final": {"linears": 0, "attentions": 0},
    }


def test_weights_are_stored_in_fp8_with_a_scale_per_output_channel(exported: Path) -> None:
    block = graph(exported, "dit_block_00")
    tensors = {tensor.name: tensor for tensor in block.initializer}
    weights = {name: list(t.dims) for name, t in tensors.items() if t.data_type == FP8}
    width = MINI.dit.width
    assert sorted(weights.values()) == sorted(
        [[width, 3 * width], [width, width], [width, width], [width, width], [width, 4 * width], [4 * width, width]]
    )
    for node in block.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:
            assert list(tensors[node.input[1]].dims) == weights[node.input[0]][1:]
            assert tensors[node.input[1]].data_type == onnx.TensorProto.BFLOAT16
            assert [a.i for a in node.attribute if a.name == "axis"] == [1]


def test_everything_that_is_quantised_feeds_a_product(exported: Path) -> None:
    block = graph(exported, "dit_block_00")
    made_by = {name: node for node in block.node for name in node.output}
    products = [node for node in block.node if node.op_type == "MatMul"]
    assert len(products) == 6 + 2  # linear layers, and the two of self-attention; cross-attention is one operator
    for node in products:
        assert {made_by[name].op_type for name in node.input} == {"DequantizeLinear"}
    assert [node.op_type for node in block.node].count("Attention") == 1


def test_each_graph_is_compared_as_its_twin(exported: Path) -> None:
    for name, entry in Manifest.load(exported).graphs.items():
        rows = entry.extras["parity"]
        assert len({json.dumps(row["sizes"]) for row in rows}) == 2
        assert {row["backend"] for row in rows} == {"onnxruntime"}
        assert all(0 < row["rms"] <= row["error"] <= row["allowed"] for row in rows)
        assert all(0.99 < row["cosine"] <= 1 + 1e-12 for row in rows), name


def test_a_twin_has_the_same_codes_and_scales(exported: Path, tmp_path: Path) -> None:
    write_fp16_twin(exported / "dit_block_00.onnx", tmp_path / "twin.onnx")
    ours, twin = graph(exported, "dit_block_00"), graph(tmp_path, "twin")
    widened = {name for node in twin.node if node.op_type == "Attention" for name in (*node.input, *node.output)}
    casts = [node for node in twin.node if widened & {*node.input, *node.output} and node.op_type == "Cast"]
    assert len(casts) == 4  # around cross-attention; self-attention is written out
    assert [node.op_type for node in twin.node if node not in casts] == [node.op_type for node in ours.node]
    originals = {tensor.name: tensor for tensor in ours.initializer}
    scales = {node.input[1] for node in ours.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for tensor in twin.initializer:
        original = originals[tensor.name]
        assert tensor.data_type != onnx.TensorProto.BFLOAT16
        if tensor.data_type == FP8:
            assert tensor.raw_data == original.raw_data
        if tensor.name in scales:
            raw = torch.frombuffer(bytearray(original.raw_data), dtype=torch.bfloat16).float()
            assert np.array_equal(onnx.numpy_helper.to_array(tensor).flatten(), raw.half().numpy())
            assert torch.equal(raw.half().float(), raw)
    spec = twin_spec(Manifest.load(exported).graphs["dit_block_00"].spec)
    assert {tensor.dtype for tensor in (*spec.inputs, *spec.outputs)} == {"float16", "float32"}


def test_weights_are_those_of_the_checkpoint(exported: Path, mini_checkpoint: Path) -> None:
    table = components(Checkpoint(mini_checkpoint), "fp32")
    counts = {name: check_weights(name, exported / f"{name}.onnx", table[name].load()) for name in GRAPHS}
    assert counts == {"dit_block_00": 6, "dit_cross_00": 1, "dit_final": 0}


def swapped(values: Tensor) -> None:
    """Two neighbours, in whatever has the channels along its last axis."""
    values[..., [4, 5]] = values[..., [5, 4]]


def doubled(values: Tensor) -> None:
    values[..., 5] *= 2


def beyond_rounding(values: Tensor) -> None:
    """A tenth, where rounding is a sixteenth at most."""
    values[..., 5] *= 1.1


@pytest.mark.parametrize("layer", ["attn1.wqkv", "attn1.wo", "attn2.wq", "attn2.wo", "ff.net.0.proj", "ff.net.2"])
@pytest.mark.parametrize("edit", [doubled, swapped, beyond_rounding])
def test_a_wrong_scale_of_one_channel_is_found(
    exported: Path, mini_checkpoint: Path, layer: str, edit: Callable[[Tensor], None], tmp_path: Path
) -> None:
    """What a graph loses in FP8 hides most of these: twice the scale of a channel passes in five layers of six."""
    model = onnx.load(str(exported / "dit_block_00.onnx"))
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{layer}.weight_scale")
    values = torch.frombuffer(bytearray(scale.raw_data), dtype=torch.bfloat16).clone()
    edit(values)
    scale.raw_data = values.view(torch.int16).numpy().tobytes()
    onnx.save(model, str(tmp_path / "wrong.onnx"))
    plain = components(Checkpoint(mini_checkpoint), "fp32")["dit_block_00"].load()
    refusal = rf"dit_block_00: {layer}\.weight must be the checkpoint's .* output channel [45] is off by"
    with pytest.raises(ExportError, match=refusal):
        check_weights("dit_block_00", tmp_path / "wrong.onnx", plain)


def test_wrong_codes_are_found(exported: Path, mini_checkpoint: Path, tmp_path: Path) -> None:
    """One bad column, with the right scales; and a layer in the place of another."""
    model = onnx.load(str(exported / "dit_block_00.onnx"))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    plain = components(Checkpoint(mini_checkpoint), "fp32")["dit_block_00"].load()
    right = tensors["attn1.wo.weight"].raw_data
    codes = np.frombuffer(right, np.uint8).reshape(MINI.dit.width, MINI.dit.width).copy()
    codes[:, 7] = codes[:, 8]
    tensors["attn1.wo.weight"].raw_data = codes.tobytes()
    onnx.save(model, str(tmp_path / "wrong.onnx"))
    with pytest.raises(ExportError, match=r"attn1\.wo\.weight .* output channel 7 .* \(1 of 256 channels are wrong\)"):
        check_weights("dit_block_00", tmp_path / "wrong.onnx", plain)
    tensors["attn1.wo.weight"].raw_data = right
    tensors["attn1.wo.weight"].name = "attn1.w.weight"
    onnx.save(model, str(tmp_path / "wrong.onnx"))
    with pytest.raises(ExportError, match=r"the FP8 weight attn1\.w\.weight must be one of \["):
        check_weights("dit_block_00", tmp_path / "wrong.onnx", plain)


def test_kept_layers_are_in_bf16_and_only_their_graphs_are_rebuilt(
    mini_checkpoint: Path, calibration: Path, exported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "kept"
    shutil.copytree(exported, out)
    keep = ("--keep-bf16", "*.attn1.core", "*.ff.*")
    assert run(mini_checkpoint, out, "--precision", "fp8", "--calibration", str(calibration), *keep) == 0
    before, after = Manifest.load(exported), Manifest.load(out)
    assert after.graphs["dit_block_00"].extras["fp8"] == {"linears": 4, "attentions": 0}
    assert after.extra["fp8"]["keep_bf16"] == ["*.attn1.core", "*.ff.*"]
    changed = {name for name in GRAPHS if after.graphs[name].key != before.graphs[name].key}
    assert changed == {"dit_block_00"}


def test_other_ranges_make_their_graphs_stale(mini_checkpoint: Path) -> None:
    checkpoint = Checkpoint(mini_checkpoint)
    table, wide = components(checkpoint, "bf16"), calibrate(checkpoint)
    changed = Calibration(wide.checkpoint, {}, {**wide.amax, "transformer_blocks.0.attn1.wo": 3.0})

    def keys(calibration: Calibration) -> dict[str, str]:
        recipe = Recipe("fp8", Fp8(calibration))
        return {name: recipe.key(component, checkpoint) for name, component in table.items()}

    before, after = keys(wide), keys(changed)
    assert {name for name in table if before[name] != after[name]} == {"dit_block_00"}


@pytest.mark.slow
def test_the_pieces_of_every_rank_are_quantised(mini_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(mini_checkpoint)
    only = ["dit_attn_00", "dit_text_00", "dit_ff_00", "step_llm_ff_01"]
    recipe = Recipe("fp8", Fp8(calibrate(checkpoint)), compare=False)
    layout = Layout.parse("tp2")
    export_graphs(checkpoint, tmp_path, only=only, layout=layout, split_llm=True, show_progress=False, recipe=recipe)
    for rank in ("tp0of2", "tp1of2"):
        graphs = Manifest.load(tmp_path / rank).graphs
        counts = {name: tuple(entry.extras["fp8"].values()) for name, entry in graphs.items()}
        assert counts == {"dit_attn_00": (2, 1), "dit_text_00": (2, 0), "dit_ff_00": (2, 0), "step_llm_ff_01": (2, 0)}


@pytest.mark.slow
def test_a_graph_with_plugins_is_compared_in_torch(mini_checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    options = ("--sm", "89", "--toolkit", "tensorrt", "--ops", "plugin", "--calibration", str(calibration))
    assert run(mini_checkpoint, tmp_path, "--precision", "fp8", *options, only=("dit_block_00",)) == 0
    extras = Manifest.load(tmp_path).graphs["dit_block_00"].extras
    assert {choice["implementation"] for choice in extras["ops"].values()} == {"plugin"}
    assert extras["fp8"] == {"linears": 6, "attentions": 0}  # the attention is a node of its own
    assert [node.domain for node in graph(tmp_path, "dit_block_00").node].count("stepvideo") >= 4
    assert {row["backend"] for row in extras["parity"]} == {"torch"}
    assert all(0 < row["error"] <= row["allowed"] for row in extras["parity"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--precision", "fp8"), "--calibration goes with --precision fp8 or nvfp4, got none"),
        (("--precision", "bf16", "--calibration", "FILE"), "goes with --precision fp8 or nvfp4, got one with"),
        (("--precision", "fp8", "--calibration", "nowhere.json"), "nowhere.json: No such file"),
        (("--precision", "fp8", "--calibration", "FILE", "--keep-bf16", "*.wkqv"), "'*.wkqv' matches none"),
        (("--keep-bf16", "*"), "--keep-bf16 goes with --precision fp8"),
        (("--ops", "native"), "--ops native needs a target"),
        (("--sm", "89"), "--sm and --toolkit go together"),
        (
            ("--precision", "fp8", "--calibration", "FILE", "--sm", "86", "--toolkit", "tensorrt"),
            "fp8 needs SM 89 or newer, got 86",
        ),
        (("--sm", "77", "--toolkit", "tensorrt"), "--sm must be one of 80, 86, 89, 90"),
        (("--precision", "bf16", "--sm", "90", "--toolkit", "tensorrt_rtx"), "--sm must be one of 80, 86, 89, 120"),
        (("--precision", "fp32", "--sm", "89", "--toolkit", "tensorrt"), "Engines are built from graphs in bf16"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    options: tuple[str, ...],
    expected: str,
    mini_checkpoint: Path,
    calibration: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(calibration) if option == "FILE" else option for option in options]
    assert run(mini_checkpoint, tmp_path / "out", *given) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


def test_a_checkpoint_that_changed_since_calibration_is_refused(
    calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "model", MINI, seed=9)
    assert run(tmp_path / "model", tmp_path / "out", "--precision", "fp8", "--calibration", str(calibration)) == 2
    assert "run python -m export.calibrate again" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.onnx"))
