"""The torch operators of this package as nodes of an ONNX graph, in the domain "stepvideo".

A node has the operator's name; its tensors are inputs, its numbers attributes. Schemas are read off the operators, so
that the two cannot differ. TensorRT finds the plugin of the same name (see registration.py).
"""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import onnx
import onnxscript
import torch
from torch._ops import OpOverload

from stepvideo_kernels.kernel_spec import ONNX_DOMAIN, ONNX_VERSION

# Operators by op: the forms that an op comes in.
OPERATORS: Mapping[str, tuple[str, ...]] = {
    "qkv_norm_rope": ("qkv_norm_rope", "qkv_norm_rope_fp8"),
    "attention": ("attention", "attention_fp8"),
    "alibi_attention": ("alibi_attention",),
    "vae_attention": ("vae_attention",),
    "adaln_modulate": ("adaln_modulate", "adaln_modulate_fp8", "adaln_residual", "adaln_residual_fp8"),
}

_ATTRIBUTES = {"float": onnx.defs.OpSchema.AttrType.FLOAT, "int": onnx.defs.OpSchema.AttrType.INT}
_ELEMENTS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(float8e4m3fn)"]


def operators() -> list[OpOverload]:
    """Every operator of this package; imports the modules that define them."""
    found = []
    for op, names in OPERATORS.items():
        import_module(f"stepvideo_kernels.{op}.op")
        found += [getattr(torch.ops.stepvideo, name).default for name in names]
    return found


def schema(operator: OpOverload) -> onnx.defs.OpSchema:
    """Each tensor may have any element type of the kernels: which go together is the KernelSpec's matter."""
    tensors = [argument for argument in operator._schema.arguments if str(argument.type) == "Tensor"]
    numbers = [argument for argument in operator._schema.arguments if str(argument.type) in _ATTRIBUTES]
    names = [*(argument.name for argument in tensors), *_output_names(operator)]
    constraints = [(f"T_{name}", _ELEMENTS, f"Element type of {name}.") for name in names]
    parameter = onnx.defs.OpSchema.FormalParameter
    return onnx.defs.OpSchema(
        _name(operator),
        ONNX_DOMAIN,
        ONNX_VERSION,
        doc=f"See the torch operator {operator}.",
        inputs=[parameter(argument.name, f"T_{argument.name}") for argument in tensors],
        outputs=[parameter(name, f"T_{name}") for name in _output_names(operator)],
        type_constraints=constraints,
        attributes=[_attribute(argument) for argument in numbers],
    )


def translation_table(chosen: Iterable[OpOverload] | None = None) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export(custom_translation_table=...): keeps each operator, all by default, as one node."""
    return {operator: _translation(operator) for operator in (operators() if chosen is None else chosen)}


def _translation(operator: OpOverload) -> Callable[..., Any]:
    opset = onnxscript.values.Opset(ONNX_DOMAIN, ONNX_VERSION)
    return onnxscript.values.Op(opset, _name(operator), schema(operator))


def _attribute(argument: Any) -> onnx.defs.OpSchema.Attribute:
    default = onnx.helper.make_attribute(argument.name, argument.default_value)
    return onnx.defs.OpSchema.Attribute(argument.name, default, f"{argument.type} argument.")


def _output_names(operator: OpOverload) -> list[str]:
    return [f"output_{index}" for index in range(len(operator._schema.returns))]


def _name(operator: OpOverload) -> str:
    return operator._schema.name.split("::")[1]
