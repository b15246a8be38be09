"""A contract stub of data-centre TensorRT as a builder, for child processes: the names that Polygraphy and the product
use. What it stands for: tactics that are timed on a GPU unless the timing cache has them, an EngineInspector, and what
TensorRT says and does about a timing cache that is damaged or of another device.

The environment says what the machine is: STUB_VERSION; STUB_GPUS, names with commas; STUB_FORM, "10" or "11", in which
the inspector writes; STUB_PRODUCTS, the data type in which it says that products are computed.
Source: TensorRT 11.1, python/src/infer/pyCore.cpp, include/NvInfer.h; forms of the inspector: public reports of 10.x
(NVIDIA/TensorRT issues 4020, 4397) and the plan that RTX 1.7 prints, which has the fields of 11.x.
"""

import enum
import json
import os
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import onnx

__version__ = os.environ.get("STUB_VERSION", "11.4.0.106")


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


TYPES: dict[int, DataType] = {onnx.TensorProto.FLOAT: DataType.FLOAT, onnx.TensorProto.BFLOAT16: DataType.BF16}


class BuilderFlag(enum.Enum):
    TF32 = 0


class NetworkDefinitionCreationFlag(enum.Enum):
    STRONGLY_TYPED = 0


class DeviceType(enum.Enum):
    GPU, DLA = range(2)


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = range(2)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class LayerType(enum.Enum):
    SHAPE = 0


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: "ILogger.Severity", msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = ILogger.Severity


class IProgressMonitor:
    pass


class IHostMemory(bytes):
    def __enter__(self) -> "IHostMemory":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        del kind, value, trace


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    del logger, namespace
    return True


def device() -> str:
    """The name of the GPU that this process sees."""
    names = os.environ["STUB_GPUS"].split(",")
    visible = os.environ["CUDA_VISIBLE_DEVICES"]
    return names[int(visible[-1])]


class ITimingCache:
    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def combine(self, input_cache: "ITimingCache", ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and input_cache.content["device"] != self.content["device"]:
            return False
        self.content["tactics"] = sorted({*self.content["tactics"], *input_cache.content["tactics"]})
        return True

    def serialize(self) -> IHostMemory:
        return IHostMemory(json.dumps(self.content).encode())


class Tensor:
    is_shape_tensor = False

    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        self.dtype = TYPES[value.type.tensor_type.elem_type]
        self.shape = tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim)


class INetworkDefinition:
    """A parsed network; iterated over, it has no layers, which is enough for those who ask for precisions."""

    def __init__(self) -> None:
        self.graph = onnx.GraphProto()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    @property
    def num_inputs(self) -> int:
        return len(self.graph.input)

    def get_input(self, index: int) -> Tensor:
        return Tensor(self.graph.input[index])

    def get_flag(self, flag: NetworkDefinitionCreationFlag) -> bool:
        return flag is NetworkDefinitionCreationFlag.STRONGLY_TYPED


class OnnxParser:
    num_errors = 0

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        del logger
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        self._network.graph.CopyFrom(onnx.load(path).graph)
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        self.shapes[input] = [list(min), list(opt), list(max)]

    def __bool__(self) -> bool:
        return bool(self.shapes)


class IBuilderConfig:
    DLA_core = -1
    default_device_type = DeviceType.GPU
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    progress_monitor: Any = None

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self._cache: ITimingCache | None = None
        self.profiles: list[IOptimizationProfile] = []
        self._flags = {BuilderFlag.TF32}

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: BuilderFlag) -> bool:
        return flag in self._flags

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache | None:
        content = bytes(memoryview(serialized_timing_cache))
        if not content:
            return ITimingCache({"version": __version__, "device": device(), "tactics": []})
        try:
            return ITimingCache(json.loads(content))
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "Error Code 1: Serialization (Magic tag does not match)")
            return None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and (cache.content["version"], cache.content["device"]) != (__version__, device()):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        if flags:
            raise ValueError("Networks are strongly typed since 11.0, without a flag.")
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._logger)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        """An engine that says how many tactics were timed for it, on which GPU, and when."""
        began_s = time.monotonic()
        cache = config.get_timing_cache()
        known = cache.content["tactics"] if cache else []
        config.progress_monitor.phase_start("Timing", None, len(network.graph.node))
        wanted = sorted({f"{node.op_type} {node.name.rpartition('_')[0]}" for node in network.graph.node})
        timed = [tactic for tactic in wanted if tactic not in known]
        time.sleep(float(os.environ.get("STUB_SECONDS", "0")) if timed else 0)
        if cache:
            cache.content["tactics"] = sorted({*known, *timed})
        config.progress_monitor.phase_finish("Timing")
        description = {
            "graph": network.graph.SerializeToString().hex(),
            "profiles": [profile.shapes for profile in config.profiles],
            "detailed": config.profiling_verbosity is ProfilingVerbosity.DETAILED,
            "timed": timed,
            "visible": os.environ["CUDA_VISIBLE_DEVICES"],
            "time_s": [began_s, time.monotonic()],
        }
        return IHostMemory(json.dumps(description).encode())


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "ICudaEngine":
        return ICudaEngine(json.loads(bytes(memoryview(serialized_engine))))


class ICudaEngine:
    device_memory_size_v2 = 4096

    def __init__(self, description: dict[str, Any]) -> None:
        self._description = description
        self._graph = onnx.GraphProto.FromString(bytes.fromhex(description["graph"]))
        self._tensors = {value.name: Tensor(value) for value in (*self._graph.input, *self._graph.output)}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        names: list[str] = list(self._tensors)
        return names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        is_input = name in {value.name for value in self._graph.input}
        return TensorIOMode.INPUT if is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        shapes: list[list[int]] = self._description["profiles"][profile_index][name]
        return shapes

    def create_engine_inspector(self) -> "EngineInspector":
        return EngineInspector(self._graph, self._description["detailed"])


class EngineInspector:
    def __init__(self, graph: onnx.GraphProto, detailed: bool) -> None:
        self._graph, self._detailed = graph, detailed

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        assert format is LayerInformationFormat.JSON
        form = os.environ.get("STUB_FORM", "11")
        layers: list[Any] = [node.name for node in self._graph.node]
        if self._detailed and form in ("10", "11"):
            layers = [_layer(node, form) for node in self._graph.node]
        elif self._detailed:
            layers = [{"Kernel": node.name} for node in self._graph.node]
        return json.dumps({"Layers": layers, "Bindings": [value.name for value in self._graph.input]})


def _layer(node: onnx.NodeProto, form: str) -> dict[str, Any]:
    """A product of an activation and a weight, as the two major versions describe one."""
    dtype = os.environ.get("STUB_PRODUCTS", "BFloat16")

    def tensor(name: str, dims: list[int]) -> dict[str, Any]:
        if form == "10":
            return {"Name": name, "Location": "Device", "Dimensions": dims, "Format/Datatype": dtype}
        return {"Name": name, "Dimensions": dims, "Strides": dims, "Datatype": dtype, "Format": "(Linear)"}

    described = {
        "Name": f"{node.name}_myl0_1",
        "LayerType": "gemm",
        "Inputs": [tensor(node.input[0], [1, -1, 64])],
        "Outputs": [tensor(node.output[0], [1, -1, 64])],
        "TacticName": "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute",
        "StreamId": 0,
        "Metadata": f"[ONNX Layer: {node.name}]\x1e",
    }
    return described if form == "10" else described | {"Constants": [tensor(node.input[1], [1, 64, 64])]}
