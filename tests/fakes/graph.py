"""An ONNX graph whose nodes ONNX Runtime computes, in pieces between the nodes of our plugins."""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepvideo_kernels.kernel_spec import ONNX_DOMAIN, ONNX_VERSION
from stepvideo_serve.engine.spec import TORCH_DTYPES, EngineSpec
from tests.fakes.plugin_classes import PluginTensorDesc

Place = tuple[int, tuple[int, ...], str]
"""Address, shape and dtype of a tensor in the GPU's memory."""
RunPlugin = Callable[[int, list["Operand"], list["Operand"]], None]


@dataclass(frozen=True)
class PluginNode:
    name: str
    operator: str
    version: str
    domain: str
    fields: Mapping[str, NDArray[Any]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Operand:
    """What a plugin is told of a tensor."""

    address: int
    description: PluginTensorDesc


class Values:
    """The engine's own tensors, read and written at their addresses."""

    def __init__(self, scale: float, places: Mapping[str, Place]) -> None:
        self._scale, self.places = scale, places

    def read(self, name: str) -> Tensor:
        return at_address(*self.places[name])

    def write(self, name: str, value: NDArray[Any]) -> None:
        place = at_address(*self.places[name])
        found = torch.from_numpy(value)
        assert found.shape == place.shape, (name, found.shape, place.shape)
        place.copy_(found * self._scale if found.is_floating_point() and self._scale != 1.0 else found)


def at_address(address: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor over memory that is somebody else's."""
    kind = TORCH_DTYPES[dtype]
    size = prod(shape) * kind.itemsize
    if not size:
        return torch.empty(shape, dtype=kind)
    raw = (ctypes.c_uint8 * size).from_address(address)
    return torch.frombuffer(raw, dtype=kind).reshape(shape)


class Graph:
    """The graph at `path`. `plugins`: (operator, version, domain) of each of its plugin nodes."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        model = onnx.load(path, load_external_data=False)
        nodes = list(model.graph.node)
        self.plugin_nodes = {i: _plugin_node(node) for i, node in enumerate(nodes) if node.domain == ONNX_DOMAIN}
        self.plugins = [(one.operator, one.version, one.domain) for one in self.plugin_nodes.values()]
        self._whole = session_of(path) if not self.plugins else None

    def run(self, values: Values, spec: EngineSpec, run_plugin: RunPlugin) -> None:
        """Computes the outputs in the dtypes of the graph, and writes them in those of the engine."""
        if self._whole is None:
            self._run_plugins(values, spec, run_plugin)
            return
        given = {node.name: as_graph(values.read(node.name), node.type) for node in self._whole.get_inputs()}
        names = [tensor.name for tensor in spec.outputs]
        for name, value in zip(names, self._whole.run(names, given), strict=True):
            values.write(name, value)

    def _run_plugins(self, values: Values, spec: EngineSpec, run_plugin: RunPlugin) -> None:
        """Graphs of plugin nodes only: each reads inputs of the engine and writes outputs."""
        del spec
        for index, node in self.plugin_nodes.items():
            inputs, outputs = (
                [_operand(*values.places[name]) for name in part] for part in (node.inputs, node.outputs)
            )
            run_plugin(index, inputs, outputs)


@lru_cache(maxsize=256)
def session_of(path: str) -> Any:
    """One session for a graph, however often it is loaded."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def as_graph(tensor: Tensor, kind: str) -> NDArray[Any]:
    """In the element type that the graph takes: it may be wider than the engine's."""
    wanted = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}.get(kind, tensor.dtype)
    found: NDArray[Any] = tensor.to(wanted).numpy()
    return found


def _plugin_node(node: Any) -> PluginNode:
    fields = {
        one.name: np.array([one.f], np.float32) for one in node.attribute if one.type == onnx.AttributeProto.FLOAT
    }
    version = str(ONNX_VERSION)
    return PluginNode(node.name, node.op_type, version, node.domain, fields, tuple(node.input), tuple(node.output))


def _operand(address: int, shape: tuple[int, ...], dtype: str) -> Operand:
    from tests.fakes.tensorrt import TYPES

    description = PluginTensorDesc()
    description.dims, description.type = shape, TYPES[dtype]
    return Operand(address, description)
