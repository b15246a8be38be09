"""ONNX graphs of one plugin node each, and shapes that fit it."""

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from stepvideo_kernels.kernel_spec import ONNX_DOMAIN, ONNX_VERSION
from stepvideo_kernels.plugins.form import MAIN, PluginForm
from stepvideo_kernels.plugins.registration import forms

ONNX_TYPES: Mapping[str, int] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "fp8": TensorProto.FLOAT8E4M3FN,
}
Dims = list[int | str]
Range = tuple[int, int, int]

# Sizes of the named dimensions: smallest, optimal and largest.
RANGES: Mapping[str, Range] = {"N": (1, 1000, 38_400), "L": (1, 200, 397), "L16": (16, 208, 400)}

_HEADS = 2
_VECTORS: Mapping[str, Dims] = {
    **{name: [128] for name in ("q_gain", "k_gain")},
    **{name: ["N", 128] for name in ("rope_cos", "rope_sin")},
    **{name: [_HEADS] for name in ("q_scale", "k_scale", "v_scale", "slopes")},
    **{name: [1, "N", 256] for name in ("x", "branch")},
    **{name: [1, 256] for name in ("gate", "scale", "shift")},
    **{name: [256] for name in ("weight", "bias")},
    "out_scale": [1],
}
_ROWS: Mapping[str, Dims] = {"q": [1, _HEADS, "N", 128], "k": [1, _HEADS, "L", 128], "v": [1, _HEADS, "L", 128]}


def form_of(operator: str) -> PluginForm:
    """The form of an operator."""
    return next(form for form in forms() if form.operator == operator)


def shapes(form: PluginForm) -> dict[str, Dims]:
    """Input -> its shape, for 2 heads."""
    special: dict[str, dict[str, Dims]] = {
        "qkv_norm_rope": {"qkv": [1, "N", 3 * 128 * _HEADS]},
        "qkv_norm_rope_fp8": {"qkv": [1, "N", 3 * 128 * _HEADS]},
        "alibi_attention": {"qkv": [1, "N", 128 * (_HEADS + 2)]},
        "vae_attention": {name: [1, "N", 96] for name in "qkv"},
        "attention": dict(_ROWS),
        "attention_fp8": {**_ROWS, "v": [1, _HEADS, 128, "L16"]},
    }
    known = {**_VECTORS, **special.get(form.operator, {})}
    return {one.name: known[one.name] for one in form.inputs}


def write(
    path: Path,
    form: PluginForm,
    element: str | None = None,
    *,
    eps: float | None = None,
    changed_shapes: Mapping[str, Dims] | None = None,
    changed_types: Mapping[str, str] | None = None,
) -> Path:
    """One node at `path`, its first input of type `element`; saved, loaded and saved again by the ONNX library."""
    first = element or form.elements[0]
    sizes = {**shapes(form), **(changed_shapes or {})}
    types = {one.name: first if one.element == MAIN else one.element for one in form.inputs} | dict(changed_types or {})
    inputs = [
        helper.make_tensor_value_info(one.name, ONNX_TYPES[types[one.name]], sizes[one.name]) for one in form.inputs
    ]
    outputs = [
        helper.make_tensor_value_info(
            f"out_{one.name}", ONNX_TYPES[first if one.element == MAIN else one.element], None
        )
        for one in form.outputs
    ]
    node = helper.make_node(
        form.operator,
        [one.name for one in inputs],
        [one.name for one in outputs],
        name=form.operator,
        domain=ONNX_DOMAIN,
    )
    if eps is not None:
        node.attribute.append(helper.make_attribute("eps", eps))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(ONNX_DOMAIN, ONNX_VERSION)]
    onnx.save(helper.make_model(helper.make_graph([node], form.operator, inputs, outputs), opset_imports=opsets), path)
    onnx.save(onnx.load(path), path)
    return path


def profile(
    form: PluginForm,
    changed_shapes: Mapping[str, Dims] | None = None,
    ranges: Mapping[str, tuple[int, int, int]] = RANGES,
) -> dict[str, list[list[int]]]:
    """Input -> smallest, optimal and largest shape, for those that are open."""
    sizes = {**shapes(form), **(changed_shapes or {})}
    return {
        name: [[ranges[dim][end] if isinstance(dim, str) else dim for dim in dims] for end in range(3)]
        for name, dims in sizes.items()
        if any(isinstance(dim, str) for dim in dims)
    }
