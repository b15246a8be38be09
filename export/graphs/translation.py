"""Our torch operators as ONNX nodes, for torch.onnx.export(custom_translation_table=...).

FP8 and NVFP4 become standard QuantizeLinear and DequantizeLinear, and TensorRT's TRT_FP4DynamicQuantize; kernels become
one node each of our own domain (stepvideo_kernels.plugins.onnx_nodes).
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnxscript
import torch
from onnx import ModelProto, TensorProto
from onnxscript import opset23

from stepvideo_serve.fused.nvfp4 import BLOCK

Table = dict[Callable[..., Any], Callable[..., Any]]

ONNX_FP8 = int(TensorProto.FLOAT8E4M3FN)
TRT_DOMAIN = "trt"
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"


def translation_table(kernels: bool = False) -> Table:
    """Of all quantising operators; `kernels`: of the fused operators too, which need the package stepvideo_kernels."""
    fused: Table = {}
    if kernels:
        from stepvideo_kernels.plugins.onnx_nodes import translation_table as kernels_table

        fused = kernels_table()
    return {**fused, **fp8_table(), **nvfp4_table()}


def fp8_table() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """The operators of fused/fp8.py as QuantizeLinear and DequantizeLinear."""

    def onnx_quantize(x: Any, scale: Any) -> Any:
        return opset23.QuantizeLinear(x, scale, output_dtype=ONNX_FP8)

    def onnx_dequantize(codes: Any, scale: Any) -> Any:
        return opset23.DequantizeLinear(codes, scale, axis=1)

    operators = torch.ops.stepvideo_qdq
    return {operators.quantize.default: onnx_quantize, operators.dequantize.default: onnx_dequantize}


def nvfp4_table() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """The operators of fused/nvfp4.py as TensorRT's and ONNX's own; `type_codes` has to finish the graph."""
    dynamic_quantize = onnxscript.values.Op(onnxscript.values.Opset(TRT_DOMAIN, 1), DYNAMIC_QUANTIZE, _schema())

    def dequantize(codes: Any, scales: Any, g: Any, axis: int) -> Any:
        wide: Any = opset23.DequantizeLinear(scales, g)
        return opset23.DequantizeLinear(codes, wide, axis=axis, block_size=BLOCK)

    def onnx_round_trip(x: Any, g: Any) -> Any:
        codes, scales = dynamic_quantize(x, g, axis=-1, block_size=BLOCK, scale_type=int(TensorProto.FLOAT8E4M3FN))
        return dequantize(codes, scales, g, axis=-1)

    def onnx_weight(packed: Any, scales: Any, g: Any) -> Any:
        return dequantize(packed, scales, g, axis=1)

    operators = torch.ops.stepvideo_nvfp4
    return {operators.round_trip.default: onnx_round_trip, operators.weight.default: onnx_weight}


def type_codes(model: ModelProto) -> int:
    """Makes packed weights what they are, E2M1 [M, K] instead of bytes [M, K / 2]: torch has no such type to export.
    Returns how many there are."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = [
        tensors[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in tensors
        and tensors[node.input[0]].data_type == TensorProto.UINT8
    ]
    for tensor in found:
        tensor.data_type = TensorProto.FLOAT4E2M1
        tensor.dims[-1] *= 2
    names = {tensor.name for tensor in found}
    declared = [value for value in model.graph.value_info if value.name not in names]
    del model.graph.value_info[:]
    model.graph.value_info.extend(declared)
    return len(found)


def _schema() -> onnx.defs.OpSchema:
    """Of TensorRT's operator: values and g -> codes and scales."""
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    integer = onnx.defs.OpSchema.AttrType.INT
    return onnx.defs.OpSchema(
        DYNAMIC_QUANTIZE,
        TRT_DOMAIN,
        1,
        doc="Quantises blocks by their own largest magnitude.",
        inputs=[parameter("x", "T"), parameter("g", "tensor(float)")],
        outputs=[parameter("codes", "tensor(float4e2m1)"), parameter("scales", "tensor(float8e4m3fn)")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Values.")],
        attributes=[attribute(name, integer, required=False) for name in ("axis", "block_size", "scale_type")],
    )
