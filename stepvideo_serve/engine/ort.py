"""Runs an ONNX graph on the CPU with ONNX Runtime.

A model is some fifty graphs that run one after the other in one process, so the defaults of ONNX Runtime do not fit.
Measured with onnxruntime 1.31 on two cores, transformer blocks of width 256 called in sequence:

  threads   8 sessions, 64 rows: 48 ms per round by default, because the idle pools of the other sessions spin; 7.2 ms
            with spinning off; 6.8 ms with one global pool. Spinning is off: the global pool gains little and would
            force one thread count on the process.
  memory    32 sessions, 1024 rows: 2370 MiB with an arena per session, 78 MiB with one arena for the process at the
            same speed; 145 MiB without an arena, but 1.6 times slower. The sessions share one arena.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.engine.ort_weights import add_weights, with_initializers
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.engine.spec import EngineSpec, TensorSpec
from stepvideo_serve.errors import EngineError

# ONNX Runtime's name of each dtype that can cross the border of a graph on the CPU.
_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "bool": "tensor(bool)",
    "uint8": "tensor(uint8)",
}


class OrtRunner(EngineRunner):
    """Runs the ONNX file at `path` (with its external data beside it) on the CPU.

    `threads`: how many threads one operator may use; None or 0 means every core that the process may use.
    `engine_id`: what reports call this graph; by default the backend and the file name.
    `content`: the bytes of that file and of its external data, by their names in the graph, the file first, as
    `GraphEntry.read` gives them. They are run in the place of the files, which ONNX Runtime would map, and so follow
    through every later change.
    `weights`: those of the spec, one layer's, which the session takes as constants.
    Inputs are read and outputs are written in place, without a copy, where the inputs are contiguous.
    EngineError if onnxruntime or the file is missing, the file is corrupt, the graph's inputs and outputs are not
    those of the spec, or the spec has a dtype other than float32, float16, int64, int32, bool and uint8.
    """

    def __init__(
        self,
        spec: EngineSpec,
        path: Path,
        threads: int | None = None,
        engine_id: str | None = None,
        content: Mapping[str, bytes] | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        ort = _onnxruntime(spec)
        super().__init__(spec, "cpu", engine_id or f"onnxruntime-{ort.__version__}:{path.name}")
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.dtype not in _ORT_TYPES:
                raise EngineError(
                    f'Engine {spec.name}: "{tensor.name}" must have a dtype that ONNX Runtime runs on a CPU '
                    f"({', '.join(_ORT_TYPES)}), got {tensor.dtype}: export the graph in fp32 or fp16."
                )
        if not path.is_file():
            raise EngineError(f"Engine {spec.name}: {path} must be an ONNX file, found none: export the graph.")
        self._path = path
        self._errors = _failures(ort)
        options = _session_options(ort, threads)
        graph: str | bytes = str(path) if content is None else _in_memory(content, options)
        self._weights: list[Any] = []  # kept alive: the session reads weights that it does not pack
        if spec.weights:
            graph = with_initializers(graph if isinstance(graph, bytes) else path.read_bytes(), spec)
            self._weights = add_weights(ort, options, spec, weights or {})
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise EngineError(
                f"Engine {spec.name}: {path} must be a valid ONNX graph with its external data, "
                f"ONNX Runtime found: {error}; export it again."
            ) from error
        _check_signature(spec, path, "inputs", spec.inputs, self._session.get_inputs())
        _check_signature(spec, path, "outputs", spec.outputs, self._session.get_outputs())

    def _run(self, inputs: dict[str, torch.Tensor], dims: dict[str, int]) -> dict[str, torch.Tensor]:
        binding = self._session.io_binding()
        contiguous = [inputs[tensor.name].contiguous() for tensor in self.spec.inputs]  # kept alive during the run
        for tensor, value in zip(self.spec.inputs, contiguous, strict=True):
            binding.bind_input(tensor.name, "cpu", 0, np.dtype(tensor.dtype), list(value.shape), value.data_ptr())
        outputs = {}
        for tensor in self.spec.outputs:
            shape = tensor.resolve(dims)
            outputs[tensor.name] = value = torch.empty(shape, dtype=tensor.torch_dtype)
            binding.bind_output(tensor.name, "cpu", 0, np.dtype(tensor.dtype), list(shape), value.data_ptr())
        try:
            self._session.run_with_iobinding(binding)
        except self._errors as error:
            shapes = {name: list(value.shape) for name, value in inputs.items()}
            raise EngineError(
                f"Engine {self.spec.name}: {self._path} must run with {shapes}, ONNX Runtime failed: {error}; "
                "check that the graph and its spec come from the same export."
            ) from error
        return outputs

    def _release(self) -> None:
        del self._session, self._weights


def _in_memory(content: Mapping[str, bytes], options: Any) -> bytes:
    """The graph's own bytes; its external data go into the options, and from there, as copies, into a session."""
    (_, graph), *external = content.items()
    if external:
        names, data = zip(*external, strict=True)
        options.add_external_initializers_from_files_in_memory(names, data, [len(part) for part in data])
    return graph


def _onnxruntime(spec: EngineSpec) -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: its wheel reports to its maker otherwise
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"Engine {spec.name}: the backend ort needs the package onnxruntime, found none ({error}): "
            "pip install onnxruntime."
        ) from error
    return onnxruntime


def _failures(ort: Any) -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises on a bad file or a failed run; its own classes have no common base."""
    native = ort.capi.onnxruntime_pybind11_state
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return (RuntimeError, native.RuntimeException, *(getattr(native, name) for name in names))


def _session_options(ort: Any, threads: int | None) -> Any:
    _share_arena(ort)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # An explicit count, because 0 would also pin the threads of every session and process to the same cores.
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    # FP8 graphs run as written: the fusions for quantised graphs take FP8 for integers and fail.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


@functools.cache
def _share_arena(ort: Any) -> None:
    """Gives the process one CPU arena for all sessions (ONNX Runtime keeps it in its own process-wide environment)."""
    native = ort.capi.onnxruntime_pybind11_state
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, native.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)


def _check_signature(
    spec: EngineSpec, path: Path, what: str, expected: tuple[TensorSpec, ...], found: list[Any]
) -> None:
    """EngineError unless the graph's tensors have the names, dtypes and ranks of the spec, and sizes that allow it."""
    by_name = {node.name: node for node in found}
    if by_name.keys() != {tensor.name for tensor in expected}:
        raise EngineError(
            f"Engine {spec.name}: {path} must have the {what} {[tensor.name for tensor in expected]}, "
            f"found {list(by_name)}: export it again."
        )
    for tensor in expected:
        node = by_name[tensor.name]
        if node.type != _ORT_TYPES[tensor.dtype] or not _allows(spec, tensor, node.shape):
            raise EngineError(
                f'Engine {spec.name}: "{tensor.name}" in {path} must be {tensor}, '
                f"found {node.type} {node.shape}: export it again."
            )


def _allows(spec: EngineSpec, tensor: TensorSpec, found: list[int | str | None]) -> bool:
    """Whether the graph's shape (int: fixed; text or None: free) takes every size that the spec's shape can have."""
    smallest, _, largest = spec.bounds(tensor)
    return len(found) == len(tensor.shape) and all(
        not isinstance(size, int) or low == size == high
        for size, low, high in zip(found, smallest, largest, strict=True)
    )
