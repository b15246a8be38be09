"""A machine with a GPU and TensorRT, as far as one process sees it: everything of this folder in its place."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest.mock import patch

from stepvideo_serve.assembly.engines import activation_memory
from stepvideo_serve.fused import kernels_package
from tests.fakes.cuda import FakeCuda
from tests.fakes.driver import FakeDriver
from tests.fakes.gpu import FakeGpu
from tests.fakes.nccl import FakeNccl, gloo_for_nccl
from tests.fakes.tensorrt import Fake, make_tensorrt


@dataclass(frozen=True)
class Machine:
    """The process's GPU, its torch.cuda, and the module tensorrt."""

    gpu: FakeGpu
    cuda: FakeCuda
    tensorrt: ModuleType

    @property
    def fake(self) -> Fake:
        found: Fake = self.tensorrt.fake
        return found


@contextmanager
def machine(total_bytes: int = 80 << 30, count: int = 1, backend: str = "tensorrt") -> Iterator[Machine]:
    """A GPU of SM 90 and this much memory, one of `count`, for this thread."""
    for of_the_process in (activation_memory, kernels_package._library):
        of_the_process.cache_clear()
    gpu = FakeGpu(total_bytes)
    cuda, module = FakeCuda(gpu, count=count), make_tensorrt(gpu, backend)
    FakeDriver.gpu = gpu
    with (
        patch.dict(sys.modules, {backend: module}),
        patch("stepvideo_kernels.launch.cuda_driver.CudaDriver", FakeDriver),
        gloo_for_nccl(),
        cuda.installed(FakeNccl(gpu)),
    ):
        yield Machine(gpu, cuda, module)
        gpu.check()
