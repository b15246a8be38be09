"""The two TensorRTs: `tensorrt` for data-centre GPUs, `tensorrt_rtx` for workstation, Ada and Blackwell RTX GPUs.

They have the same Python interface, so that the runner (_nvinfer.py) takes the module as a parameter.
"""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from stepvideo_serve.errors import EngineError

PACKAGES: Mapping[str, str] = MappingProxyType({"tensorrt": "tensorrt-cu13", "tensorrt_rtx": "tensorrt-rtx-cu13"})
"""Backend, which is the module's name -> the package to install."""


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
