"""The GPUs of this machine, as its driver tells them: data-centre TensorRT builds, and times its tactics, on them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepvideo_serve.errors import ExportError

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """sm: compute capability, 90 for 9.0; visible: what CUDA_VISIBLE_DEVICES calls it."""

    name: str
    sm: int
    visible: str


@dataclass(frozen=True)
class Slot:
    """Where one build at a time runs: what its process gets of the environment. `gpu`: its name, "" where none is
    asked for."""

    gpu: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def build_slots(backend: str, sm: int, jobs: int) -> tuple[Slot, ...]:
    """One slot for each of `jobs` builds at a time; for `tensorrt` each has a GPU of this architecture to itself, and
    all are of the same kind, so that what one has timed holds for the others.

    Raises ExportError where there are fewer, and where there is no GPU of the architecture.
    """
    if jobs < 1:
        raise ExportError(f"--jobs must be at least 1 build at a time, got {jobs}: correct it.")
    if backend != "tensorrt":
        return (Slot(),) * jobs
    gpus = local_gpus()
    if not gpus:
        raise ExportError(
            "tensorrt builds on a GPU, found none: build on the machine that serves, or use tensorrt_rtx."
        )
    fitting = [gpu for gpu in gpus if gpu.sm == sm]
    if not fitting:
        raise ExportError(f"tensorrt builds for the GPU of this machine, SM {gpus[0].sm}, got --sm {sm}.")
    alike = [gpu for gpu in fitting if gpu.name == fitting[0].name]
    if len(alike) < jobs:
        raise ExportError(
            f"--jobs needs a GPU for each build, {jobs} were asked for, found {len(alike)} ({alike[0].name}): "
            f"ask for at most {len(alike)}."
        )
    return tuple(Slot(gpu.name, {VISIBLE: gpu.visible}) for gpu in alike[:jobs])


def local_gpus() -> tuple[Gpu, ...]:
    """All GPUs that this process may use; none where there is no driver. The driver is asked: torch may be a build for
    CPUs, and processes that build do without it."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ExportError(
            f"tensorrt builds on a GPU, which is asked for by the package cuda-bindings, found none ({error}): "
            "pip install 'stepvideo-serve[gpu]' on a machine with a GPU, or use tensorrt_rtx."
        ) from None

    def ask(name: str, *arguments: Any) -> Any:
        status, *results = getattr(driver, name)(*arguments)
        return None if int(status) else (results[0] if results else True)

    try:
        count = ask("cuDeviceGetCount") if ask("cuInit", 0) else None
    except RuntimeError:  # how cuda.bindings says that there is no driver
        return ()
    names = driver.CUdevice_attribute
    version = names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    found = []
    for index in range(count or 0):
        device = ask("cuDeviceGet", index)
        major, minor = (ask("cuDeviceGetAttribute", one, device) for one in version)
        found.append(Gpu(_text(ask("cuDeviceGetName", NAME_BYTES, device)), 10 * major + minor, _visible(index)))
    return tuple(found)


NAME_BYTES = 128


def _text(name: bytes) -> str:
    return name.rstrip(b"\0 ").decode(errors="replace")


def _visible(index: int) -> str:
    """The driver counts those that CUDA_VISIBLE_DEVICES names, if there is any; a child needs their names."""
    chosen = os.environ.get(VISIBLE)
    return chosen.split(",")[index].strip() if chosen else str(index)
