"""A contract stub of TensorRT's Python bindings (11.x, and RTX 1.x): the names and signatures that the product uses.

Everything else is missing, so that a name that no release has, or none since 10.x, is an AttributeError here as well.
An "engine" (engines.py) names an ONNX graph, which ONNX Runtime computes. What TensorRT refuses with False or None and
a message to the logger is refused so; what TensorRT demands and does not notice raises ContractError.
Source: TensorRT 11.1, python/src/infer/pyCore.cpp and pyPlugin.cpp, include/NvInferRuntime.h.
"""

import enum
import json
import sys
import traceback
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from stepvideo_serve.engine.spec import EngineSpec
from tests.fakes.clocks import ContractError
from tests.fakes.gpu import FakeGpu, Range
from tests.fakes.graph import Graph, Values
from tests.fakes.plugin_classes import PLUGIN_CLASSES, PluginField, PluginFieldCollection, TensorRTPhase

MAGIC = b"ftrt"
ALIGNMENT = 256
VERSION = "11.4.0.106"
Shape = tuple[int, ...]


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


TYPES: Mapping[str, DataType] = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "bfloat16": DataType.BF16,
    "float8_e4m3fn": DataType.FP8,
    "int64": DataType.INT64,
    "int32": DataType.INT32,
    "bool": DataType.BOOL,
    "uint8": DataType.UINT8,
}


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class ILogger:
    """To be derived from; `log` is called by whoever has an error to tell."""

    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: "ILogger.Severity", msg: str) -> None:
        raise NotImplementedError


def make_tensorrt(gpu: FakeGpu, name: str = "tensorrt", version: str = VERSION) -> ModuleType:
    """The module for one GPU of one process. `module.fake` is for tests."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    fake = Fake(gpu, version)

    class Runtime(_Runtime):
        __slots__ = ()

        def __init__(self, logger: ILogger) -> None:
            super().__init__(fake, logger)

    names: dict[str, Any] = {
        "__version__": version,
        "DataType": DataType,
        "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
        "ILogger": ILogger,
        "Runtime": Runtime,
        "get_plugin_registry": lambda: fake.registry,
        **PLUGIN_CLASSES,
    }
    for key, value in names.items():
        setattr(module, key, value)
    module.fake = fake  # type: ignore[attr-defined]
    return module


class Fake:
    """What the objects of one module share, and what a test may ask of them."""

    def __init__(self, gpu: FakeGpu, version: str) -> None:
        self.gpu, self.version = gpu, version
        self.registry = _PluginRegistry()
        self.runtimes = 0
        self.refuse_enqueue = ""
        """Why every enqueue is refused; "" when it is not."""
        self.lose_at_enqueue: int | None = None
        """How many enqueues from now the GPU is lost by an illegal access."""
        self.scale_outputs = 1.0
        """Of floating-point outputs: an engine that computes something else."""

    def count_enqueue(self) -> None:
        if self.lose_at_enqueue is None:
            return
        self.lose_at_enqueue -= 1
        if self.lose_at_enqueue == 0:
            self.gpu.poison = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class _PluginRegistry:
    __slots__ = ("all_creators",)

    def __init__(self) -> None:
        self.all_creators: list[Any] = []

    def register_creator(self, creator: Any, plugin_namespace: str = "") -> bool:
        if self.get_creator(creator.name, creator.plugin_version, plugin_namespace) is not None:
            return False
        creator.plugin_namespace = plugin_namespace
        self.all_creators.append(creator)
        return True

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
        wanted = (type, version, plugin_namespace)
        found = (one for one in self.all_creators if (one.name, one.plugin_version, one.plugin_namespace) == wanted)
        return next(found, None)


class _Runtime:
    __slots__ = ("_fake", "_logger")

    def __init__(self, fake: Fake, logger: ILogger) -> None:
        if not isinstance(logger, ILogger) or not hasattr(logger, "_made"):
            raise TypeError("Runtime(logger: ILogger): a logger that was initialised is needed.")
        self._fake, self._logger = fake, logger
        fake.runtimes += 1

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "_CudaEngine | None":
        content = bytes(memoryview(serialized_engine))
        self._fake.gpu.check()
        made = self._made(content)
        if isinstance(made, _CudaEngine):
            return made
        self._logger.log(ILogger.Severity.ERROR, f"IRuntime::deserializeCudaEngine: {made}")
        return None

    def _made(self, content: bytes) -> "_CudaEngine | str":
        """The engine, or why there is none."""
        if not content.startswith(MAGIC):
            return "Error Code 1: Serialization (magicTag mismatch)"
        description = json.loads(content[len(MAGIC) :])
        if description["version"] != self._fake.version:
            return "Error Code 1: Serialization (the engine plan file is not compatible)"
        weight_bytes = description["weight_bytes"]
        if weight_bytes > self._fake.gpu.free_bytes:
            return f"Error Code 2: OutOfMemory (Requested size was {weight_bytes} bytes.)"
        graph = Graph(description["onnx"])
        for operator, version, domain in graph.plugins:
            if self._fake.registry.get_creator(operator, version, domain) is None:
                return f"Error Code 4: Internal Error (Cannot find plugin: {operator}, {version})"
        return _CudaEngine(self._fake, self._logger, description, graph)


class _CudaEngine:
    __slots__ = ("__weakref__", "_description", "_device", "_fake", "_graph", "_logger", "_spec")

    def __init__(self, fake: Fake, logger: ILogger, description: dict[str, Any], graph: Graph) -> None:
        self._fake, self._logger, self._description, self._graph = fake, logger, description, graph
        self._spec = EngineSpec.from_json(description["spec"])
        self._device = fake.gpu.device
        weight_bytes = description["weight_bytes"]
        fake.gpu.taken_bytes += weight_bytes

        def free() -> None:
            fake.gpu.taken_bytes -= weight_bytes

        weakref.finalize(self, free).atexit = False

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def device_memory_size_v2(self) -> int:
        return int(self._description["activation_bytes"])

    @property
    def _tensors(self) -> tuple[Any, ...]:
        return self._spec.tensors

    def _tensor(self, name: str) -> Any:
        return next((tensor for tensor in self._tensors if tensor.name == name), None)

    def get_tensor_name(self, index: int) -> str:
        return str(self._tensors[index].name)

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self._tensor(name).dtype]

    def get_tensor_shape(self, name: str) -> Shape:
        return tuple(-1 if isinstance(size, str) else size for size in self._tensor(name).shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        if profile_index != 0:
            raise ValueError("This engine has one profile.")
        return list(self._spec.bounds(self._tensor(name)))

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> "_ExecutionContext | None":
        self._fake.gpu.check()
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise ContractError("The product gives contexts their memory (USER_MANAGED), this one would take its own.")
        return _ExecutionContext(self)


class _ExecutionContext:
    __slots__ = ("_addresses", "_engine", "_memory", "_plugins", "_prepared", "_shapes")

    def __init__(self, engine: _CudaEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._memory: Range | None = None
        self._prepared: dict[int, Any] = {}
        self._plugins = {
            index: _plugin(engine._fake.registry, node).attach_to_context(None)
            for index, node in engine._graph.plugin_nodes.items()
        }

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        given, tensor = tuple(shape), self._engine._tensor(name)
        if tensor is None or tensor not in self._engine._spec.inputs:
            return self._refused(f"setInputShape: {name} is no input")
        low, _, high = self._engine._spec.bounds(tensor)
        if len(given) != len(low) or not all(a <= b <= c for a, b, c in zip(low, given, high, strict=True)):
            return self._refused(f"setInputShape: {name} {given} does not satisfy the profile {low} .. {high}")
        self._shapes[name] = given
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._engine._tensor(name) is None:
            return self._refused(f"setTensorAddress: {name} is no tensor")
        if memory % ALIGNMENT:
            raise ContractError(f"{self._engine._spec.name}: {name} must be aligned to {ALIGNMENT}, got {memory:#x}.")
        self._addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        needed = self._engine.device_memory_size_v2
        if memory % ALIGNMENT or size < needed or (needed and not memory):
            raise ContractError(f"{self._engine._spec.name} needs {needed} aligned bytes, got {size} at {memory:#x}.")
        self._memory = memory, needed

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, fake = self._engine, self._engine._fake
        if fake.gpu.device != engine._device:
            raise ContractError(f"{engine._spec.name} is on {engine._device}, the current GPU is {fake.gpu.device}.")
        fake.count_enqueue()
        if fake.gpu.poison is not None:
            return self._refused(f"Error Code 1: Cuda Runtime ({fake.gpu.poison})")
        if fake.refuse_enqueue:
            return self._refused(fake.refuse_enqueue)
        spec, what = engine._spec, f"engine {engine._spec.name}"
        missing = [tensor.name for tensor in engine._tensors if tensor.name not in self._addresses]
        missing += [tensor.name for tensor in spec.inputs if tensor.name not in self._shapes]
        if missing or (self._memory is None and engine.device_memory_size_v2):
            return self._refused(f"enqueueV3: not set: {missing or 'device memory'}")
        weights = [weight.tensor for weight in spec.weights]  # of fixed shapes, which need not be set
        shapes = {**_all_shapes(spec, self._shapes), **{tensor.name: tensor.resolve({}) for tensor in weights}}
        ranges = {t.name: (self._addresses[t.name], _bytes(t, shapes[t.name])) for t in engine._tensors}
        reads = [ranges[tensor.name] for tensor in (*spec.inputs, *weights)]
        writes = [ranges[tensor.name] for tensor in spec.outputs]
        scratch = [self._memory] if self._memory is not None and self._memory[1] else []
        for name, (start, size) in ranges.items():
            fake.gpu.block_of(start, size, f"{what}: {name}") if size else None
        fake.gpu.launch(fake.gpu.streams[stream_handle], what, reads, [*writes, *scratch])
        places = {t.name: (self._addresses[t.name], shapes[t.name], t.dtype) for t in engine._tensors}
        values = Values(fake.scale_outputs, places)
        try:
            engine._graph.run(values, spec, partial(self._run_plugin, stream_handle))
        except ContractError:
            raise
        except Exception:
            if not self._plugins:
                raise
            print("[ERROR] Exception thrown from enqueue()", file=sys.stderr)
            traceback.print_exc()
            return self._refused("Error Code 2: Internal Error (a plugin failed)")
        return True

    def _run_plugin(self, stream_handle: int, index: int, inputs: list[Any], outputs: list[Any]) -> None:
        """Descriptions and addresses of one plugin layer."""
        plugin = self._plugins[index]
        descriptions = [[one.description for one in tensors] for tensors in (inputs, outputs)]
        key = [(tuple(one.dims), one.type) for one in (*descriptions[0], *descriptions[1])]
        if self._prepared.get(index) != key:
            plugin.on_shape_change(*descriptions)
            self._prepared[index] = key
        addresses = [[one.address for one in tensors] for tensors in (inputs, outputs)]
        plugin.enqueue(*descriptions, *addresses, 0, stream_handle)

    def _refused(self, message: str) -> bool:
        self._engine._logger.log(ILogger.Severity.ERROR, f"IExecutionContext::{message}")
        return False


def _plugin(registry: _PluginRegistry, node: Any) -> Any:
    creator = registry.get_creator(node.operator, node.version, node.domain)
    fields = PluginFieldCollection([PluginField(name, array) for name, array in node.fields.items()])
    return creator.create_plugin(node.name, fields, TensorRTPhase.RUNTIME)


def _all_shapes(spec: EngineSpec, given: Mapping[str, Shape]) -> dict[str, Shape]:
    """The inputs' shapes as they were set; raises ContractError where one symbol has two sizes."""
    dims: dict[str, int] = {}
    for tensor in spec.inputs:
        for expected, size in zip(tensor.shape, given[tensor.name], strict=True):
            if isinstance(expected, str):
                factor, _, symbol = expected.rpartition("*")
                value = size // int(factor or 1)
                if dims.setdefault(symbol, value) != value:
                    raise ContractError(f"{spec.name}: {symbol} is {dims[symbol]} and {value}.")
    return {**given, **spec.output_shapes(dims)}


def _bytes(tensor: Any, shape: Shape) -> int:
    size = int(tensor.torch_dtype.itemsize)
    for one in shape:
        size *= one
    return size
