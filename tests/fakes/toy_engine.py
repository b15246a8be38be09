"""The toy graph of tests/engine as an engine of the stub."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stepvideo_serve.engine.manifest import GraphFile
from stepvideo_serve.engine.nvinfer import ActivationMemory, NvInferRunner, load_tensorrt
from tests.engine.toy import Graph
from tests.fakes.engines import ACTIVATION_BYTES, WEIGHT_BYTES, write_engine
from tests.fakes.machine import machine
from tests.fakes.tensorrt import VERSION


@contextmanager
def open_on_stub(toy: Graph) -> Iterator[NvInferRunner]:
    """A machine with nothing but this engine."""
    with machine(), tempfile.TemporaryDirectory() as folder, open_toy(toy, Path(folder)) as runner:
        yield runner


def open_toy(
    toy: Graph,
    folder: Path,
    memory: ActivationMemory | None = None,
    activation_bytes: int = ACTIVATION_BYTES,
    weight_bytes: int = WEIGHT_BYTES,
    version: str = VERSION,
) -> NvInferRunner:
    """On the machine at hand."""
    write_engine(folder / "toy.engine", toy.onnx_path, toy.spec, activation_bytes, weight_bytes, version)
    file = GraphFile.of(folder, "toy.engine")
    memory = memory or ActivationMemory(torch.device("cuda", 0))
    return NvInferRunner(load_tensorrt("tensorrt"), toy.spec, folder, file, memory, "toy:stub")
