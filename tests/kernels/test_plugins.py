"""The plugins in TensorRT-RTX: every operator parsed to a plugin layer and built, the whole DiT block, and refusals."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt

from stepvideo_kernels.kernel_spec import SMS
from stepvideo_kernels.plugins.onnx_nodes import operators
from stepvideo_kernels.plugins.registration import creator_class, forms, register
from tests.kernels import plugin_graphs
from tests.kernels.plugin_builds import Job, Result, build
from tests.kernels.plugin_graphs import Dims, form_of

OPERATORS = [form.operator for form in forms()]
TARGETS = (89, 120)
EPS = 3e-5


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Result]:
    """Every operator for both targets."""
    folder = tmp_path_factory.mktemp("plugins")
    jobs: dict[tuple[str, int], Job] = {}
    for form in forms():
        eps = EPS if form.attributes else None
        path = plugin_graphs.write(folder / f"{form.operator}.onnx", form, eps=eps)
        jobs |= {(form.operator, sm): Job(str(path), sm, plugin_graphs.profile(form)) for sm in TARGETS}
    return dict(zip(jobs, build(list(jobs.values()), root, folder), strict=True))


@pytest.mark.parametrize("sm", TARGETS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_becomes_one_plugin_layer_and_an_engine(
    built: dict[tuple[str, int], Result], operator: str, sm: int
) -> None:
    result, form = built[operator, sm], form_of(operator)
    assert result.refusals == []
    assert result.plugin_layers == [operator]
    assert len(result.layers) == 1
    assert operator.encode().hex() in result.engine
    kinds = {"fp8": "FP8", "main": {"bf16": "BF16", "fp8": "FP8"}[form.elements[0]], "bf16": "BF16"}
    assert [kind for kind, _ in result.outputs] == [kinds[one.element] for one in form.outputs]
    assert [len(shape) for _, shape in result.outputs] == [one.rank for one in form.outputs]


def test_shapes_of_the_outputs_follow_the_inputs(built: dict[tuple[str, int], Result]) -> None:
    rows, columns = [1, 2, -1, 128], [1, 2, 128, -1]
    assert [shape for _, shape in built["qkv_norm_rope_fp8", 89].outputs] == [rows, rows, columns]
    assert [shape for _, shape in built["attention", 89].outputs] == [[1, -1, 256]]
    assert [shape for _, shape in built["alibi_attention", 89].outputs] == [[1, -1, 256]]
    assert [shape for _, shape in built["adaln_residual", 89].outputs] == [[1, -1, 256], [1, -1, 256]]


@pytest.mark.parametrize("operator", [form.operator for form in forms() if form.attributes])
def test_attributes_reach_the_engine_through_a_saved_graph(built: dict[tuple[str, int], Result], operator: str) -> None:
    written, default = (np.float32(value).tobytes().hex() for value in (EPS, form_of(operator).attributes["eps"]))
    assert written in built[operator, 89].engine
    assert default not in built[operator, 89].engine


@pytest.mark.parametrize("form", forms(), ids=OPERATORS)
def test_what_an_engine_stores_makes_an_equal_plugin(form: Any) -> None:
    creator = creator_class(trt)(form, register(trt))
    given = dict.fromkeys(form.attributes, 0.0007)
    arrays = {name: np.array([value], np.float32) for name, value in given.items()}
    fields = [trt.PluginField(name, array, trt.PluginFieldType.FLOAT32) for name, array in arrays.items()]
    plugin = creator.create_plugin("any", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    assert plugin.attributes == pytest.approx(given)
    stored = plugin.clone().attach_to_context(None).get_fields_to_serialize()
    again = creator.create_plugin("any", stored, trt.TensorRTPhase.RUNTIME)
    assert again.attributes == plugin.attributes
    assert (again.plugin_name, again.num_outputs) == (form.operator, len(form.outputs))
    assert again.get_workspace_size([], []) == 0


def test_forms_are_the_operators_of_the_exports() -> None:
    schemas = {operator._schema.name.split("::")[1]: operator._schema for operator in operators()}
    assert set(schemas) == set(OPERATORS)
    for form in forms():
        arguments = schemas[form.operator].arguments
        assert [one.name for one in form.inputs] == [one.name for one in arguments if str(one.type) == "Tensor"]
        defaults = {one.name: one.default_value for one in arguments if str(one.type) == "float"}
        assert dict(form.attributes) == defaults
        assert len(form.outputs) == len(schemas[form.operator].returns)


def test_registering_twice_changes_nothing() -> None:
    first = register(trt, sm=89)
    count = len(trt.get_plugin_registry().all_creators)
    again = register(trt, sm=120)
    assert again is first
    assert first.sm == 120
    assert len(trt.get_plugin_registry().all_creators) == count
    assert len(first.creators) == len(OPERATORS)
    assert trt.get_plugin_registry().get_creator("attention", "1", "stepvideo") is not None


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "wrong type": ("attention", {"element": "fp32"}, "attention takes q in bf16 or fp16, got fp32: cast before it."),
    "types that differ": (
        "attention",
        {"changed_types": {"k": "fp16"}},
        "attention takes k in bf16, got fp16: cast before it.",
    ),
    "scales in bf16": (
        "attention_fp8",
        {"changed_types": {"q_scale": "bf16"}},
        "attention_fp8 takes q_scale in fp32, got bf16: cast before it.",
    ),
    "head size": (
        "attention",
        {"changed_shapes": {"q": [1, 2, "N", 64], "k": [1, 2, "L", 64], "v": [1, 2, "L", 64]}},
        "attention takes a head size of 128, got 64: use the reference for it.",
    ),
    "width of a head that does not divide": (
        "vae_attention",
        {"changed_shapes": {name: [1, "N", 100] for name in "qkv"}},
        "vae_attention takes a head size of a multiple of 32 up to 512, got 100: use the reference for it.",
    ),
    "tokens before heads": (
        "attention",
        {"changed_shapes": {"q": [1, "N", 2, 128]}},
        "got [1, 2, 397, 128]: it takes q [B, H, N, 128], k and v [B, H, L, 128].",
    ),
    "no axis of heads": (
        "attention",
        {"changed_shapes": {"q": ["N", 256]}},
        "attention takes q with 4 dimensions, got 2 in [?, 256]: it takes q [B, H, N, 128], k and v [B, H, L, 128].",
    ),
    "FP8 values that are not transposed": (
        "attention_fp8",
        {"changed_shapes": {"v": [1, 2, "L", 128]}},
        "attention_fp8 takes v as [1, 2, 128, 400] beside the other inputs, got [1, 2, 397, 128]",
    ),
    "a projection of no whole heads": (
        "qkv_norm_rope",
        {"changed_shapes": {"qkv": [1, "N", 400]}},
        "qkv_norm_rope takes qkv as [1, ?, 384] beside the other inputs, got [1, ?, 400]",
    ),
    "slopes of other heads": (
        "alibi_attention",
        {"changed_shapes": {"slopes": [3]}},
        "with groups dividing the 3 heads, got 512: give the output of wqkv and one slope per head.",
    ),
    "a gate for each token": (
        "adaln_residual",
        {"changed_shapes": {"gate": [1, 512]}},
        "adaln_residual takes gate as [1, 256] beside the other inputs, got [1, 512]",
    ),
}


@pytest.fixture(scope="module")
def refused(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("refused")
    jobs = {}
    for index, (name, (operator, changes, _)) in enumerate(BAD.items()):
        form, changed = form_of(operator), changes.get("changed_shapes")
        path = plugin_graphs.write(folder / f"{index}.onnx", form, **changes)
        jobs[name] = Job(str(path), 89, plugin_graphs.profile(form, changed))
    return dict(zip(jobs, build(list(jobs.values()), root, folder), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_what_the_kernel_does_not_take_is_refused_at_build(refused: dict[str, Result], name: str) -> None:
    result = refused[name]
    assert result.engine == ""
    assert len(result.refusals) == 1
    assert BAD[name][2] in result.refusals[0]


def test_limits_of_tokens_and_architectures_are_judged_at_build(root: Path, tmp_path: Path) -> None:
    adaln, attention = form_of("adaln_modulate"), form_of("attention_fp8")
    long = plugin_graphs.profile(adaln, ranges={**plugin_graphs.RANGES, "N": (1, 1000, 1 << 25)})
    jobs = [
        Job(str(plugin_graphs.write(tmp_path / "long.onnx", adaln)), 89, long),
        Job(str(plugin_graphs.write(tmp_path / "old.onnx", attention)), 80, plugin_graphs.profile(attention)),
    ]
    too_long, too_old = build(jobs, root, tmp_path)
    assert too_long.refusals == ["adaln_modulate takes up to 16777216 tokens, got 33554432: split the sequence."]
    assert too_old.refusals == ["attention_fp8 takes fp8 from SM 89 on, got SM 80: use another type."]
    assert too_long.engine == too_old.engine == ""


@pytest.mark.parametrize("form", forms(), ids=OPERATORS)
def test_a_form_takes_what_its_spec_does(form: Any) -> None:
    """Full-size widths on every architecture that has the types."""
    fixed: dict[str, Dims] = plugin_graphs.shapes(form)
    known = {name: tuple(-1 if isinstance(dim, str) else dim for dim in dims) for name, dims in fixed.items()}
    elements = [form.elements[0] if one.element == "main" else one.element for one in form.inputs]
    for sm in SMS:
        if sm >= 89 or "fp8" not in (*elements, *form.output_elements(elements)):
            form.check(known, elements, sm)


def test_a_server_needs_no_compiler_and_no_exporter(root: Path) -> None:
    """What registers, finds and launches the kernels imports neither torch nor ONNX nor the Triton language."""
    code = (
        "import sys, tensorrt_rtx; from pathlib import Path; import stepvideo_kernels.launch.library; "
        "from stepvideo_kernels.plugins.registration import device_kernels, register; "
        "register(tensorrt_rtx, device_kernels(Path('kernels'))); "
        "print([name for name in ('torch', 'onnx', 'onnxscript', 'triton') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{root / 'kernels'}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
