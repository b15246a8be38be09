"""The runner for both TensorRTs: `tensorrt` for data-centre GPUs, `tensorrt_rtx` for workstation, Ada and Blackwell RTX
GPUs. They have the same Python interface, so that the imported module is a parameter.

All engines of a process run one after the other, on one stream, in one piece of scratch memory (ActivationMemory): a
block of the DiT needs gigabytes of it, and there are 48. They share one Runtime and one logger, too.
Source for the calls: the Python interface of TensorRT 11 (IExecutionContext, ICudaEngine).
"""

import mmap
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from stepvideo_serve.engine.device_errors import require_context
from stepvideo_serve.engine.manifest import GraphFile, Reads, read_and_hash
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.engine.spec import EngineSpec, TensorSpec
from stepvideo_serve.errors import EngineError, MemoryShortage

PACKAGES: Mapping[str, str] = MappingProxyType({"tensorrt": "tensorrt-cu13", "tensorrt_rtx": "tensorrt-rtx-cu13"})
"""Backend, which is the module's name -> the package to install."""

ALIGNMENT = 256
"""Of every address that TensorRT is given, in bytes."""

_OUT_OF_MEMORY = re.compile("out ?of ?memory", re.IGNORECASE)


def load_tensorrt(backend: str) -> Any:
    """The module. Raises EngineError, with the command that installs it, where it is missing."""
    package = PACKAGES[backend]
    try:
        return import_module(backend)
    except ImportError as error:
        raise EngineError(
            f"The backend {backend} needs the package {package}, found none ({error}): pip install {package}, "
            "in the version that built the engines."
        ) from error


_DTYPES: Mapping[str, str] = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "float8_e4m3fn": "FP8",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
    "uint8": "UINT8",
}


class ActivationMemory:
    """Scratch memory and stream of all engines of a process on one GPU; it grows to what the largest one needs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def size_bytes(self) -> int:
        return max(len(self._buffer) - ALIGNMENT, 0)

    @property
    def pointer(self) -> int:
        """The address of the memory, aligned as TensorRT asks."""
        return -(-self._buffer.data_ptr() // ALIGNMENT) * ALIGNMENT

    def reserve(self, size_bytes: int) -> None:
        """Grows to the bytes that an engine needs. Raises MemoryShortage when the GPU has too little."""
        if size_bytes <= self.size_bytes:
            return
        self.stream.synchronize()
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self.device)  # free the old one first
        torch.cuda.empty_cache()  # and have torch give its memory back: TensorRT allocates outside of torch
        try:
            self._buffer = torch.empty(size_bytes + ALIGNMENT, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise MemoryShortage(
                f"The engines need {size_bytes / 2**30:.1f} GiB for their activations, {free / 2**30:.1f} GiB of the "
                f"GPU's {total / 2**30:.1f} are free: choose a layout with more ranks, or build for smaller shapes."
            ) from error


@dataclass(frozen=True)
class Toolkit:
    """What the engines of one TensorRT module share in a process."""

    logger: Any
    runtime: Any


@cache
def toolkit_of(trt: Any) -> Toolkit:
    """The toolkit that all engines of this process share: a Runtime for each of some 290 would only cost memory."""
    logger = make_logger(trt)
    return Toolkit(logger, trt.Runtime(logger))


class NvInferRunner(EngineRunner):
    """Runs one engine on the GPU of `memory`.

    trt            the imported module
    directory, file  where the engine lies; its SHA-256 is compared before anything reads it as an engine
    reads          gives the file's content and its SHA-256
    Inputs are read and outputs are written in place, without a copy, where the inputs are contiguous and begin at an
    address that TensorRT takes.
    EngineError if the file is missing or another one, or was built for something else, or the GPU runs out of memory.
    """

    def __init__(
        self,
        trt: Any,
        spec: EngineSpec,
        directory: Path,
        file: GraphFile,
        memory: ActivationMemory,
        engine_id: str,
        reads: Reads = read_and_hash,
    ) -> None:
        super().__init__(spec, memory.device, engine_id)
        toolkit = toolkit_of(trt)
        self._memory = memory
        self._logger = toolkit.logger
        with checked_file(spec.name, directory, file, reads) as content:
            self._engine = toolkit.runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise _not_loaded(spec.name, directory / file.path, trt, self._logger.last_error)
        check_signature(trt, spec, self._engine)
        self._context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise _too_large(spec.name, self._logger.last_error)
        memory.reserve(self._engine.device_memory_size_v2)

    @property
    def _weights(self) -> Mapping[str, Tensor]:
        """On the GPU, by their names in the graph."""
        return {}

    def _run(self, inputs: dict[str, Tensor], dims: dict[str, int]) -> dict[str, Tensor]:
        if self.spec.weights and not self._weights:
            raise EngineError(f"Engine {self.spec.name} takes weights, got none: run a layer of it (LayerRunner).")
        bound = {name: _aligned(tensor.contiguous()) for name, tensor in inputs.items()}  # kept alive until enqueued
        outputs = empty_outputs(self.spec, dims, self.device)
        current = torch.cuda.current_stream(self.device)
        self._memory.stream.wait_stream(current)
        with torch.cuda.device(self.device):  # TensorRT asks for it, and threads begin on GPU 0
            self._enqueue(bound, outputs)
        current.wait_stream(self._memory.stream)  # also: what is freed now is not reused before the engine is done
        return outputs

    def _enqueue(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Starts the engine on the shared stream; tensors are contiguous."""
        context = self._context
        accepted = [context.set_input_shape(name, tuple(tensor.shape)) for name, tensor in inputs.items()]
        tensors = {**inputs, **self._weights, **outputs}
        accepted += [context.set_tensor_address(name, tensor.data_ptr()) for name, tensor in tensors.items()]
        shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
        if not all(accepted):
            raise self._refused(shapes)
        context.set_device_memory(self._memory.pointer, self._memory.size_bytes)
        if not context.execute_async_v3(self._memory.stream.cuda_stream):
            raise self._refused(shapes)

    def _refused(self, shapes: Mapping[str, list[int]]) -> EngineError:
        """The error of a refused call. Raises DeviceLost where the cause is an earlier kernel that lost the GPU."""
        require_context(f"TensorRT refused to run {self.spec.name} ({self._logger.last_error})", self.device)
        profile = {name: [list(shape) for shape in bounds] for name, bounds in self.spec.profile().items()}
        return EngineError(
            f"Engine {self.spec.name} must run with {shapes} (profile {profile}), TensorRT refused: "
            f"{self._logger.last_error}; build the engine again."
        )

    def _release(self) -> None:
        self._memory.stream.synchronize()
        del self._context, self._engine


class LayerRunner(NvInferRunner):
    """One layer of an engine that takes its weights as inputs: they are bound at each call, without a copy.

    kind     the open engine; layers of a process share it with its context, since they run one after the other
    weights  by their names in the graph, on the GPU of the engine, contiguous
    EngineError if they do not fit the spec of the engine.
    """

    def __init__(self, kind: NvInferRunner, name: str, engine_id: str, weights: Mapping[str, Tensor]) -> None:
        EngineRunner.__init__(self, replace(kind.spec, name=name), kind.device, engine_id)
        self.spec.check_weights(weights)
        self._memory, self._logger = kind._memory, kind._logger
        self._engine, self._context = kind._engine, kind._context
        self._bound = {weight: _aligned(tensor.contiguous()) for weight, tensor in weights.items()}

    @property
    def _weights(self) -> Mapping[str, Tensor]:
        return self._bound

    def _release(self) -> None:
        super()._release()
        del self._bound


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that TensorRT takes: torch's own allocations are, a part of one may not be."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _not_loaded(name: str, path: Path, trt: Any, reason: str) -> EngineError:
    if _OUT_OF_MEMORY.search(reason):
        return _too_large(name, reason)
    return EngineError(
        f"Engine {name}: {path} must load into {trt.__name__} {trt.__version__}, it does not: {reason}; build it with "
        "this version for this GPU."
    )


def _too_large(name: str, reason: str) -> MemoryShortage:
    return MemoryShortage(
        f"Engine {name} must fit into the GPU's memory, it does not: {reason}; choose a layout with more ranks."
    )


def require_room(weights: Mapping[str, int], available: int) -> None:
    """MemoryShortage unless the weights (bytes by engine) fit into `available` bytes of the GPU's memory."""
    total = sum(weights.values())
    if total > available:
        raise MemoryShortage(
            f"The engines need {total / 2**30:.1f} GiB for their weights, {max(available, 0) / 2**30:.1f} GiB are free "
            "beside their activations: choose a layout with more ranks."
        )


def empty_outputs(spec: EngineSpec, dims: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
    """New tensors for the outputs at these sizes."""
    return {
        tensor.name: torch.empty(tensor.resolve(dims), dtype=tensor.torch_dtype, device=device)
        for tensor in spec.outputs
    }


@contextmanager
def checked_file(name: str, directory: Path, file: GraphFile, reads: Reads = read_and_hash) -> Iterator[mmap.mmap]:
    """The file's bytes as a mapping that was compared with the manifest's hash: what is read later is what was
    compared. EngineError if it is missing or another one."""
    path = directory / file.path
    try:
        with path.open("rb") as opened:
            mapped, digest = reads(opened, lambda: mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
            with mapped as content:
                if digest != file.sha256:
                    raise EngineError(
                        f"Engine {name}: {path} must have SHA-256 {file.sha256}, found {digest}: it was damaged or "
                        "replaced, build it again."
                    )
                yield content
    except (OSError, ValueError) as error:
        raise EngineError(f"Engine {name}: {path} must be a file of {file.size_bytes} bytes: {error}.") from error


def check_signature(trt: Any, spec: EngineSpec, engine: Any) -> None:
    """EngineError unless the engine's tensors have the names and dtypes of the spec, and its profile the sizes."""
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    expected = {tensor.name for tensor in spec.tensors}
    if names != expected:
        raise EngineError(f"Engine {spec.name} must have the tensors {sorted(expected)}, found {sorted(names)}.")
    for tensor in spec.tensors:
        wanted, found = getattr(trt.DataType, _DTYPES[tensor.dtype]), engine.get_tensor_dtype(tensor.name)
        if wanted != found:
            raise EngineError(f'Engine {spec.name}: "{tensor.name}" must be {wanted}, found {found}: build it again.')
    for tensor in spec.inputs:
        _check_profile(spec, tensor, engine)
    for weight in spec.weights:
        found = tuple(engine.get_tensor_shape(weight.name))
        if found != weight.tensor.shape:
            raise EngineError(
                f'Engine {spec.name}: weight "{weight.name}" must be {weight.tensor}, found {list(found)}: build it '
                "again."
            )


def _check_profile(spec: EngineSpec, tensor: TensorSpec, engine: Any) -> None:
    if not tensor.symbols:
        return
    lowest, _, highest = spec.bounds(tensor)
    found = [tuple(shape) for shape in engine.get_tensor_profile_shape(tensor.name, 0)]
    if (found[0], found[2]) != (lowest, highest):
        raise EngineError(
            f'Engine {spec.name}: "{tensor.name}" must have a profile of {lowest} .. {highest}, found {found[0]} .. '
            f"{found[2]}: build it again."
        )


def make_logger(trt: Any) -> Any:
    """A logger of TensorRT that keeps the last error for our own message."""

    class LastError(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = "it gave no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last_error = message

    return LastError()
