"""The fp16 twin of a bf16 graph: the same nodes and weights, every bf16 tensor in fp16.

ONNX Runtime has no bf16 kernels on a CPU; the twin shows what the graph that TensorRT compiles computes. FP8 codes and
scales stay bit for bit what they are (see fused/fp8.py); other constants are rounded to fp16, and finite ones beyond
its range, such as masks of the most negative bf16 number, become its largest.

`Attention` goes between casts to fp32 and back. On GPUs it is one kernel with its scores and sums in fp32, as in torch;
ONNX Runtime's own in fp16 rounds scores, softmax and sums to fp16, whose error grows with the number of keys. Its
matrix products and convolutions in fp16 have fp32 sums already (measured: one rounding of the result, no more).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto, helper

from stepvideo_serve.engine.spec import EngineSpec, TensorSpec
from stepvideo_serve.errors import ExportError

BF16, FP16, FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT
FP16_MAX = 65504.0
INSIDE_BYTES = 1 << 20
DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type")


def twin_spec(spec: EngineSpec, dtype: str = "float16") -> EngineSpec:
    """The signature with `dtype`, "float16" or "float32", for bfloat16."""

    def twin(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, dtype=dtype) if tensor.dtype == "bfloat16" else tensor

    weights = tuple(replace(weight, tensor=twin(weight.tensor)) for weight in spec.weights)
    return replace(spec, inputs=tuple(map(twin, spec.inputs)), outputs=tuple(map(twin, spec.outputs)), weights=weights)


def write_fp16_twin(path: Path, twin: Path, dtype: str = "float16") -> None:
    """Reads the graph at `path`, in bf16 or fp16, with its external data and writes its twin, with its own data beside;
    `dtype` "float32": bf16 becomes fp32, for graphs whose products need the range.
    Raises ExportError for an attention of tensors whose type the graph does not give."""
    model, to = onnx.load(str(path)), FP16 if dtype == "float16" else FP32
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            _retype(value.type, to)
        for tensor in graph.initializer:
            _convert(tensor, to)
        for node in graph.node:
            for attribute in node.attribute:
                _convert_attribute(attribute, to)
        _widen_attention(graph)
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > INSIDE_BYTES
    onnx.save(model, str(twin), save_as_external_data=large, location=f"{twin.name}.data", size_threshold=1024)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _widen_attention(graph: GraphProto) -> None:
    """Every 16-bit input of an attention through a cast to fp32, every such output back to fp16."""
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type != "Attention" or node.domain:
            nodes.append(node)
            continue
        before, after = [], []
        for index, name in enumerate(node.input):
            if name and _type_of(types, name, node) == FP16:
                node.input[index] = wide = f"{name}__{node.name}_{index}"
                before.append(helper.make_node("Cast", [name], [wide], f"{wide}_cast", to=FP32))
        for index, name in enumerate(node.output):
            if name and _type_of(types, name, node) == FP16:
                node.output[index] = wide = f"{name}__wide"
                after.append(helper.make_node("Cast", [wide], [name], f"{wide}_cast", to=FP16))
        nodes += [*before, node, *after]
    del graph.node[:]
    graph.node.extend(nodes)


def _type_of(types: Mapping[str, int], tensor: str, node: NodeProto) -> int:
    if tensor not in types:
        raise ExportError(
            f"The graph must give the type of {tensor}, an input or output of {node.name}, it gives none: "
            "export it again."
        )
    return types[tensor]


def _retype(type_: TypeProto, to: int) -> None:
    if type_.HasField("tensor_type") and type_.tensor_type.elem_type == BF16:
        type_.tensor_type.elem_type = to


def _convert_attribute(attribute: AttributeProto, to: int) -> None:
    if attribute.name in DTYPE_ATTRIBUTES and attribute.i == BF16:
        attribute.i = to
    if attribute.HasField("t"):
        _convert(attribute.t, to)


def _convert(tensor: TensorProto, to: int) -> None:
    if tensor.data_type != BF16:
        return
    raw = tensor.raw_data or bytes(torch.tensor(tensor.int32_data, dtype=torch.int32).to(torch.int16).numpy().data)
    wide = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).float() if raw else torch.empty(0)
    tensor.ClearField("int32_data")
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.DEFAULT
    tensor.data_type = to
    tensor.raw_data = (in_fp16(wide) if to == FP16 else wide).numpy().tobytes()


def in_fp16(wide: torch.Tensor) -> torch.Tensor:
    """fp32 in fp16, where finite numbers beyond its range are its largest."""
    return torch.where(wide.isinf(), wide, wide.clamp(-FP16_MAX, FP16_MAX)).half()
