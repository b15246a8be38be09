"""The two TensorRTs and what each can build for.

`tensorrt` builds for the GPU of the machine; `tensorrt_rtx` builds for any of its architectures, without a GPU too.
Both have the same Python interface, so everything else takes the imported module as a parameter.
"""

import os
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stepvideo_serve.errors import ExportError

SMS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "tensorrt": (80, 86, 89, 90, 100, 103, 120, 121),
        "tensorrt_rtx": (80, 86, 89, 120, 121),
    }
)
# The lowest architecture whose tensor cores take the precision.
LOWEST_SM: Mapping[str, int] = MappingProxyType({"bf16": 80, "fp16": 80, "fp8": 89, "nvfp4": 100})
_DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tensorrt": ("tensorrt-cu13", "tensorrt", "tensorrt-cu12"),
        "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx", "tensorrt-rtx-cu12"),
    }
)
_RTX_LIBRARY = "libtensorrt_rtx.so"
RTX_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"


def check_target(backend: str, sm: int, precision: str) -> None:
    """Raises ExportError, naming what there is, for an unknown backend or SM, or a precision that the SM lacks."""
    if backend not in SMS:
        raise ExportError(f"--backend must be one of {', '.join(SMS)}, got {backend!r}.")
    if sm not in SMS[backend]:
        raise ExportError(f"--sm must be one of {', '.join(map(str, SMS[backend]))} for {backend}, got {sm}.")
    if precision not in LOWEST_SM:
        raise ExportError(
            f"Engines are built from graphs in {', '.join(LOWEST_SM)}, found {precision}: "
            "export the graphs again with one of these as --precision."
        )
    if sm < LOWEST_SM[precision]:
        raise ExportError(
            f"{precision} needs SM {LOWEST_SM[precision]} or newer, got {sm}: choose a newer GPU, or bf16."
        )


def check_local_gpu(backend: str, sm: int) -> None:
    """Raises ExportError where `tensorrt` has to build for another architecture than the GPU of this machine."""
    if backend != "tensorrt":
        return
    found = _local_sm()
    if found is None:
        raise ExportError(
            "tensorrt builds on a GPU, found none: build on the machine that serves, or use tensorrt_rtx."
        )
    if sm != found:
        raise ExportError(f"tensorrt builds for the GPU of this machine, SM {found}, got --sm {sm}.")


def _local_sm() -> int | None:
    """Compute capability of the first GPU, 90 for 9.0, or None where there is no driver or no GPU. The driver is asked:
    torch may be a build for CPUs, and processes that build do without it."""
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
        device = ask("cuDeviceGet", 0) if ask("cuInit", 0) else None
    except RuntimeError:  # how cuda.bindings says that there is no driver
        return None
    if device is None:
        return None
    names = driver.CUdevice_attribute
    major = ask("cuDeviceGetAttribute", names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = ask("cuDeviceGetAttribute", names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return int(10 * major + minor)


def toolkit_version(backend: str) -> str:
    """Version of the installed library. Raises ExportError, with the command that installs it."""
    for distribution in _DISTRIBUTIONS[backend]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise ExportError(
        f"{backend} must be installed to build engines, found none of {', '.join(_DISTRIBUTIONS[backend])}: "
        f"pip install {_DISTRIBUTIONS[backend][0]}."
    )


def child_environment(backend: str, folder: Path) -> dict[str, str]:
    """The environment of a process that builds.

    Polygraphy takes the TensorRT that its variables name, and installs nothing. The parser of TensorRT-RTX opens
    libtensorrt_rtx.so by that name, which the wheel does not have: it gets a link in `folder`, named in
    LD_LIBRARY_PATH, which is read when a process starts.
    """
    environment = {**os.environ, RTX_SWITCH: str(int(backend == "tensorrt_rtx")), "POLYGRAPHY_AUTOINSTALL_DEPS": "0"}
    if backend == "tensorrt_rtx":
        library = Path(sysconfig.get_paths()["platlib"], "tensorrt_rtx_libs", f"{_RTX_LIBRARY}.1")
        if library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            link = folder / _RTX_LIBRARY
            link.unlink(missing_ok=True)
            link.symlink_to(library)
            paths = [str(folder.absolute()), environment.get("LD_LIBRARY_PATH", "")]
            environment["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
    return environment
