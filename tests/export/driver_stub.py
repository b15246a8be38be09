"""The CUDA driver as `cuda.bindings` answers: GPUs of SM 90, those of STUB_GPUS that CUDA_VISIBLE_DEVICES shows."""

import enum
import os
from typing import Any


class CUdevice_attribute(enum.Enum):  # noqa: N801 - the name of the bindings
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


VERSION = {75: 9, 76: 0}
OK = 0


def _names() -> list[str]:
    names = os.environ["STUB_GPUS"].split(",")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [names[int(one[-1])] for one in visible.split(",")] if visible else names


def cuInit(flags: int) -> tuple[Any, ...]:  # noqa: N802
    del flags
    return (OK,)


def cuDeviceGetCount() -> tuple[Any, ...]:  # noqa: N802
    return OK, len(_names())


def cuDeviceGet(ordinal: int) -> tuple[Any, ...]:  # noqa: N802
    return OK, ordinal


def cuDeviceGetName(length: int, device: int) -> tuple[Any, ...]:  # noqa: N802
    return OK, _names()[device].encode().ljust(length, b"\0")


def cuDeviceGetAttribute(attribute: CUdevice_attribute, device: int) -> tuple[Any, ...]:  # noqa: N802
    del device
    return OK, VERSION[attribute.value]
