"""Faults that the product had or might get, each put back by a patch while the context lasts.

test_mutations.py says which named test each of them turns red.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from stepvideo_serve.assembly import engines
from stepvideo_serve.engine import nvinfer
from stepvideo_serve.engine.manifest import GraphEntry, Manifest
from stepvideo_serve.errors import EngineError
from stepvideo_serve.parallel import collectives
from stepvideo_serve.parallel.communicator import Done
from tests.fakes.cuda import FakeCuda, FakeStream

Patched = AbstractContextManager[Any]


def kernels_are_sought_in_the_folder_of_the_part() -> Patched:
    """Each group of engines named the folder beside its own files."""
    real = engines.load_engines

    def load_engines(config: Any, manifest: Any, names: Any, kernels: Path, *others: Any) -> Any:
        del kernels
        return real(config, manifest, names, config.model.engines_dir / engines.KERNELS_FOLDER, *others)

    return patch.object(engines, "load_engines", load_engines)


def kernels_are_sought_at_the_first_request() -> Patched:
    def register_plugins(trt: Any, folder: Path, entries: Mapping[str, GraphEntry], manifest: Manifest) -> None:
        del entries, manifest
        from stepvideo_kernels.plugins.registration import device_kernels, register

        register(trt, device_kernels(folder))

    return patch.object(engines, "register_plugins", register_plugins)


def every_engine_has_a_runtime() -> Patched:
    return patch.object(nvinfer, "toolkit_of", nvinfer.toolkit_of.__wrapped__)


def activations_are_subtracted_twice() -> Patched:
    """What an earlier group reserved is taken for used, and subtracted once more."""
    real = nvinfer.require_room

    def require_room(weights: Mapping[str, int], available: int) -> None:
        real(weights, available - engines.activation_memory(torch.device("cuda", 0)).size_bytes)

    return patch.object(engines, "require_room", require_room)


def torch_keeps_the_smaller_buffer() -> Patched:
    return patch.object(FakeCuda, "empty_cache", lambda _: None)


def addresses_are_taken_as_they_are() -> Patched:
    return patch.object(nvinfer, "_aligned", lambda tensor: tensor)


def an_engine_does_not_wait_for_torch() -> Patched:
    return _one_sided_wait(waits=lambda stream: stream.cuda_stream == 0)


def torch_does_not_wait_for_an_engine() -> Patched:
    return _one_sided_wait(waits=lambda stream: stream.cuda_stream != 0)


def running_out_of_memory_asks_for_another_build() -> Patched:
    def not_loaded(name: str, path: Path, trt: Any, reason: str) -> EngineError:
        return EngineError(f"Engine {name}: {path} must load into {trt.__name__}, it does not: {reason}; build it.")

    return patch.object(nvinfer, "_not_loaded", not_loaded)


def reserving_raises_what_torch_raises() -> Patched:
    real = nvinfer.ActivationMemory.reserve

    def reserve(self: nvinfer.ActivationMemory, size_bytes: int) -> None:
        try:
            real(self, size_bytes)
        except EngineError as error:
            raise error.__cause__ or error from None

    return patch.object(nvinfer.ActivationMemory, "reserve", reserve)


def refusals_are_not_noticed() -> Patched:
    """What setters and enqueue return is dropped."""

    def enqueue(self: nvinfer.NvInferRunner, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        for name, tensor in inputs.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
        for name, tensor in {**inputs, **self._weights, **outputs}.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        self._context.set_device_memory(self._memory.pointer, self._memory.size_bytes)
        self._context.execute_async_v3(self._memory.stream.cuda_stream)

    return patch.object(nvinfer.NvInferRunner, "_enqueue", enqueue)


def sums_are_not_waited_for() -> Patched:
    real = collectives.Collectives.sum_tp

    def sum_tp(self: collectives.Collectives, partial: Tensor) -> Done:
        return Done(real(self, partial).result)

    return patch.object(collectives.Collectives, "sum_tp", sum_tp)


def _one_sided_wait(waits: Any) -> Patched:
    real = FakeStream.wait_stream

    def wait_stream(self: FakeStream, other: FakeStream) -> None:
        if waits(self):
            real(self, other)

    return patch.object(FakeStream, "wait_stream", wait_stream)
