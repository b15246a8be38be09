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
RTX_SWITCH, LIBRARY_PATH = "POLYGRAPHY_USE_TENSORRT_RTX", "LD_LIBRARY_PATH"


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
    libtensorrt_rtx.so by that name, which the wheel does not have: see `link_libraries`.
    """
    environment = {**os.environ, RTX_SWITCH: str(int(backend == "tensorrt_rtx")), "POLYGRAPHY_AUTOINSTALL_DEPS": "0"}
    if backend == "tensorrt_rtx":
        paths = [str(link_libraries(folder)), environment.get(LIBRARY_PATH, "")]
        environment[LIBRARY_PATH] = ":".join(path for path in paths if path)
    return environment


def link_libraries(folder: Path) -> Path:
    """A folder for LD_LIBRARY_PATH, which is read when a process starts: `folder`, made absolute, where
    libtensorrt_rtx.so is a link to the library of the wheel, if that is installed."""
    library = Path(sysconfig.get_paths()["platlib"], "tensorrt_rtx_libs", f"{_RTX_LIBRARY}.1")
    if library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / _RTX_LIBRARY
        link.unlink(missing_ok=True)
        link.symlink_to(library)
    return folder.absolute()
