"""The plan of an engine: its layers after fusion, their data types, its inputs and memory; and what the builder of
TensorRT-RTX prints about one.

The plan is printed at the end of a build with detailed verbosity; that text is the only way to see it where there is no
GPU to load the engine. Where there is one: inspection.py.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from stepvideo_serve.errors import ExportError

_SECTIONS = ("Inputs", "Constants", "Outputs")
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d,]*)\],.*?Datatype: (\w+)")
_LAYER = re.compile(r"^Name: (.*?), LayerType: ([^,]*), ")
_TACTIC = re.compile(r", TacticName: ([^,]*)")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_BINDING = re.compile(r"^ ?Name: ([^,]*), IOMode: (\w+), DataType: (\w+), Dimensions: \[([-\d,]*)\]")
_PROFILE = re.compile(r"MinShape: (\[[\d,]*\]), OptShape: (\[[\d,]*\]), MaxShape: (\[[\d,]*\])")


@dataclass(frozen=True)
class PlanTensor:
    """`dims`: -1 where the size is not fixed; `dtype` as TensorRT writes it: Float, Half, BFloat16, FP8, Int64, ..."""

    name: str
    dims: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class PlanLayer:
    """One step of the engine. `onnx_nodes`: the nodes of the ONNX graph that it computes, or a part of them."""

    name: str
    kind: str
    tactic: str
    inputs: tuple[PlanTensor, ...]
    constants: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    onnx_nodes: tuple[str, ...]

    @property
    def is_fused_attention(self) -> bool:
        """One kernel from queries, keys and values to the result."""
        return "mha" in self.name or "mha" in self.tactic

    @property
    def is_matrix_product(self) -> bool:
        """A GEMM, alone or with pointwise operations behind it."""
        is_product = self.kind in ("gemm", "MatrixMultiply") or "Fc" in self.name or "gemm" in self.tactic
        return is_product and not self.is_fused_attention

    @property
    def weight(self) -> PlanTensor | None:
        """The largest constant: the weight of a GEMM. None for a product of two activations."""
        matrices = [tensor for tensor in self.constants if sum(size > 1 for size in tensor.dims) >= 2]
        return max(matrices, key=lambda tensor: prod(tensor.dims), default=None)


@dataclass(frozen=True)
class Binding:
    """An input or output; `profile`: smallest, optimal and largest shape of an input, none for an output."""

    name: str
    mode: str
    dtype: str
    dims: tuple[int, ...]
    profile: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    layers: tuple[PlanLayer, ...]
    bindings: tuple[Binding, ...]
    activation_bytes: int
    weight_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_plan(log: str) -> Plan:
    """The plan in the text that a build logged. Raises ExportError when there is none."""
    lines = log.splitlines()
    layers = tuple(_layer(line) for line in lines if _LAYER.match(line))
    bindings = tuple(_binding(line) for line in lines if _BINDING.match(line))
    if not layers or not bindings:
        raise ExportError(
            f"The builder must print the plan with its layers and tensors, found {len(layers)} layers and "
            f"{len(bindings)} tensors in {len(lines)} lines: this version of TensorRT prints it in another form."
        )
    return Plan(layers, bindings, _total(log, "Activation"), _total(log, "Weights"))


def _layer(line: str) -> PlanLayer:
    head = _LAYER.match(line)
    assert head is not None
    tactic = _TACTIC.search(line)
    tensors = {name: tuple(_tensors(_section(line, name))) for name in _SECTIONS}
    return PlanLayer(
        name=head[1],
        kind=head[2],
        tactic=tactic[1] if tactic else "",
        inputs=tensors["Inputs"],
        constants=tensors["Constants"],
        outputs=tensors["Outputs"],
        onnx_nodes=onnx_nodes(line),
    )


def onnx_nodes(metadata: str) -> tuple[str, ...]:
    """The nodes of the ONNX graph that a layer's metadata names."""
    return tuple(_ONNX_NODE.findall(metadata))


def _section(line: str, name: str) -> str:
    """The text between the brackets of "Inputs: [...]"; brackets nest."""
    begin = line.find(f", {name}: [")
    if begin < 0:
        return ""
    depth, start = 0, line.index("[", begin)
    for end in range(start, len(line)):
        depth += (line[end] == "[") - (line[end] == "]")
        if depth == 0:
            return line[start : end + 1]
    return line[start:]


def _tensors(text: str) -> Iterator[PlanTensor]:
    return (PlanTensor(name, _sizes(dims), dtype) for name, dims, dtype in _TENSOR.findall(text))


def _binding(line: str) -> Binding:
    head = _BINDING.match(line)
    assert head is not None
    profile = _PROFILE.search(line)
    shapes = tuple(_sizes(text.strip("[]")) for text in profile.groups()) if profile else ()
    return Binding(head[1], head[2], head[3], _sizes(head[4]), shapes)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _total(log: str, what: str) -> int:
    found = re.search(rf"Total {what} Memory: (\d+) bytes", log)
    if found is None:
        raise ExportError(f"The builder must print the total of its {what.lower()} memory, found none in its log.")
    return int(found[1])
