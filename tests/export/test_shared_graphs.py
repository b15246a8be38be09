"""Graphs whose weights are inputs: one of a kind gives for every layer what the layer's own graph gives."""

from collections.abc import Callable
from math import prod
from pathlib import Path

import onnx
import pytest
import torch

from export.graphs.example_inputs import LARGE_SIZES, sample_inputs
from export.graphs.recipe import INPUT, Recipe
from export.quantize.fp8 import require_gains
from export.tiny_checkpoint import write_checkpoint
from export.to_onnx import export_graphs, main
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.layer_weights import LayerWeights
from stepvideo_serve.engine.manifest import LAYERS, Manifest
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.parity import WEIGHTS
from stepvideo_serve.engine.spec import CODES, LAYER, EngineSpec
from stepvideo_serve.errors import EngineError, ExportError
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.weights.cuts import TensorPart
from tests.export.calibrated import calibrated
from tests.mini import MINI

ONLY = ["dit_block*", "dit_cross*", "dit_embed", "hunyuan_clip", "step_llm*"]
ONE_GRAPH_EACH = {"dit_block", "dit_cross", "dit_embed", "hunyuan_clip", "step_llm_embed", "step_llm_layer"}
Outputs = dict[str, torch.Tensor]


def export(model: Path, out: Path, recipe: Recipe, only: list[str] | None = None, **options: object) -> Manifest:
    return export_graphs(Checkpoint(model), out, only=only, show_progress=False, recipe=recipe, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared")
    export(mini_checkpoint, out, Recipe("fp32", weights=INPUT), ONLY)
    return out


@pytest.fixture(scope="module")
def constant(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("constant")
    export(mini_checkpoint, out, Recipe("fp32", compare=False), ONLY)
    return out


def run(
    folder: Path, name: str, weights: Callable[[str, EngineSpec], dict[str, torch.Tensor]] | None = None
) -> Outputs:
    """The graph on inputs that its spec decides."""
    entry = Manifest.load(folder).graph(name)
    given = weights(name, entry.spec) if weights else {}
    with OrtRunner(entry.spec, folder / entry.file, 1, weights=given) as runner:
        return runner(**sample_inputs(entry.spec, LARGE_SIZES, seed=4))


def test_there_is_one_graph_of_a_kind_and_no_weights_in_it(shared: Path) -> None:
    manifest = Manifest.load(shared)
    assert manifest.graphs.keys() == ONE_GRAPH_EACH
    assert {name: entry.extras[LAYERS] for name, entry in manifest.graphs.items() if entry.extras[LAYERS]} == {
        "dit_block": [0, 1],
        "dit_cross": [0, 1],
        "step_llm_layer": [0, 1],
    }
    for entry in manifest.graphs.values():
        model = onnx.load(str(shared / entry.file))
        assert max((prod(one.dims) for one in model.graph.initializer), default=0) <= 256
        given = {value.name for value in model.graph.input}
        assert given == {
            tensor.name for tensor in (*entry.spec.inputs, *(weight.tensor for weight in entry.spec.weights))
        }
    weights = {weight.name: weight.key for weight in manifest.graph("dit_block_01").spec.weights}
    assert weights["attn1.wqkv.weight"] == f"transformer_blocks.{LAYER}.attn1.wqkv.weight"
    assert "attn2.wkv.weight" not in weights  # that of another graph


@pytest.mark.parametrize("name", ["dit_block_00", "dit_block_01", "dit_cross_01", "dit_embed", "hunyuan_clip"])
def test_a_layer_gives_the_bits_of_its_own_graph(
    mini_checkpoint: Path, shared: Path, constant: Path, name: str
) -> None:
    found = run(shared, name, LayerWeights(Checkpoint(mini_checkpoint)).of)
    expected = run(constant, name)
    assert all(torch.equal(found[output], expected[output]) for output in expected)


def test_step_llm_in_layers_gives_what_the_whole_gives(mini_checkpoint: Path, shared: Path, constant: Path) -> None:
    weights = LayerWeights(Checkpoint(mini_checkpoint))
    manifest = Manifest.load(shared)
    inputs = sample_inputs(Manifest.load(constant).graph("step_llm").spec, LARGE_SIZES, seed=4)
    for name in ("step_llm_embed", "step_llm_layer_00", "step_llm_layer_01"):
        entry = manifest.graph(name)
        with OrtRunner(entry.spec, shared / entry.file, 1, weights=weights.of(name, entry.spec)) as runner:
            (tokens,) = runner(**inputs).values()
        inputs = {"tokens": tokens}
    torch.testing.assert_close(inputs["tokens"], run(constant, "step_llm")["llm_states"], rtol=1e-5, atol=1e-5)


def test_the_report_has_rows_of_every_layer_and_checkpoint(mini_checkpoint: Path, shared: Path, tmp_path: Path) -> None:
    """Another checkpoint of the same shape is compared with the graphs that are there."""
    graphs = {path.name: path.stat().st_mtime_ns for path in shared.glob("dit_block*.onnx")}
    rows = Manifest.load(shared).graph("dit_block").extras["parity"]
    assert {row["layer"] for row in rows} == {0, 1}
    write_checkpoint(tmp_path / "other", MINI, seed=9)
    manifest = export(tmp_path / "other", shared, Recipe("fp32", weights=INPUT), ["dit_block"])
    assert {path.name: path.stat().st_mtime_ns for path in shared.glob("dit_block*.onnx")} == graphs
    both = manifest.graph("dit_block").extras["parity"]
    assert both[: len(rows)] == rows
    assert len({row[WEIGHTS] for row in both}) == 2
    again = export(mini_checkpoint, shared, Recipe("fp32", weights=INPUT), ["dit_block"])
    assert again.graph("dit_block").extras["parity"] == both


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_loses_no_more_than_twice_what_torch_does(
    mini_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    manifest = export(mini_checkpoint, tmp_path, Recipe(precision, weights=INPUT), ["dit_block", "step_llm_layer"])
    for entry in manifest.graphs.values():
        assert len(entry.extras["parity"]) == 4  # two layers at two shapes
        assert all(0 < row["error"] <= row["allowed"] < 0.05 for row in entry.extras["parity"])


def test_fp8_loses_no_more_than_twice_what_the_quantised_layers_do(mini_checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe("fp8", calibrated(mini_checkpoint), weights=INPUT)
    manifest = export(mini_checkpoint, tmp_path, recipe, ["dit_block", "dit_cross", "step_llm_layer"])
    counts = {name: entry.extras["fp8"] for name, entry in manifest.graphs.items()}
    assert counts["dit_block"] == {"linears": 6, "attentions": 1}
    assert counts["step_llm_layer"] == {"linears": 4, "attentions": 0}
    spec = manifest.graph("dit_block").spec
    codes = {weight.name: weight.tensor for weight in spec.weights if weight.form == CODES}
    assert codes["ff.net.2.weight"].dtype == "float8_e4m3fn"
    assert codes["ff.net.2.weight"].shape == (256, 1024)  # K contiguous
    for entry in manifest.graphs.values():
        assert all(row["error"] <= row["allowed"] for row in entry.extras["parity"])


def test_layers_that_keep_other_parts_have_a_variant(mini_checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe("fp8", calibrated(mini_checkpoint, ("transformer_blocks.1.ff.*",)), weights=INPUT)
    manifest = export(mini_checkpoint, tmp_path, recipe, ["dit_block*"])
    assert {name: entry.extras[LAYERS] for name, entry in manifest.graphs.items()} == {
        "dit_block": [0],
        "dit_block.2": [1],
    }
    assert manifest.graph("dit_block_01").extras["fp8"]["linears"] == 4


@pytest.mark.slow
def test_slices_have_one_graph_for_all_ranks(mini_checkpoint: Path, tmp_path: Path) -> None:
    layout = Layout.parse("tp2")
    manifest = export(mini_checkpoint, tmp_path, Recipe("fp32", weights=INPUT), layout=layout, split_llm=True)
    assert not list(tmp_path.glob("tp*"))
    kinds = {"dit_attn", "dit_text", "dit_ff", "dit_cross", "step_llm_attn", "step_llm_ff"}
    assert kinds < manifest.graphs.keys()
    constant = tmp_path / "constant"
    export(mini_checkpoint, constant, Recipe("fp32", compare=False), layout=layout, split_llm=True)
    for index in range(2):
        weights = LayerWeights(Checkpoint(mini_checkpoint), TensorPart(index, 2))
        for name in Manifest.load(constant / f"tp{index}of2").graphs:
            expected = run(constant / f"tp{index}of2", name)
            found = run(tmp_path, name, weights.of)
            assert all(torch.equal(found[output], expected[output]) for output in expected), name


def test_weights_of_another_shape_or_layout_are_refused(mini_checkpoint: Path, shared: Path) -> None:
    spec = Manifest.load(shared).graph("dit_block").spec
    given = LayerWeights(Checkpoint(mini_checkpoint)).of("dit_block_00", spec)
    path = shared / "dit_block.onnx"
    short = {**given, "scale_shift_table": given["scale_shift_table"][:5]}
    with pytest.raises(
        EngineError, match=r'weight "scale_shift_table" must be float32 \[6, 256\], got float32 \[5, 256\]'
    ):
        OrtRunner(spec, path, 1, weights=short)
    del given["scale_shift_table"]
    with pytest.raises(EngineError, match=r"weights must be .* missing \['scale_shift_table'\]"):
        OrtRunner(spec, path, 1, weights=given)


def test_norm_gains_beyond_the_constant_scale_are_refused() -> None:
    with pytest.raises(ExportError, match=r"largest norm gain of 0\.0625 to 9 .*, k_norm has 12: keep it in bf16"):
        require_gains("transformer_blocks.0.attn1.core", {"q_norm": torch.ones(8), "k_norm": torch.full((8,), 12.0)})


def test_nvfp4_keeps_its_weights(mini_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = tmp_path / "calibration.json"
    calibrated(mini_checkpoint).calibration.save(calibration)
    options = ["--precision", "nvfp4", "--calibration", str(calibration), "--weights", "input"]
    assert main(["--model-dir", str(mini_checkpoint), "--out", str(tmp_path), "--quiet", *options]) == 2
    assert "constant with --precision nvfp4" in capsys.readouterr().err
