"""Arguments of a kernel in the form that the CUDA driver takes them."""

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from stepvideo_kernels.compile.binaries import (
    SCALAR_BYTES,
    TENSOR_MAP_ALIGNMENT,
    TENSOR_MAP_BYTES,
    Binary,
    descriptor_block,
)
from stepvideo_serve.errors import EngineError

POINTER_ALIGNMENT = 16
_FLOAT_FORMATS = {"fp16": "e", "fp32": "f", "fp64": "d"}


@dataclass(frozen=True)
class TensorView:
    """A tensor in device memory for a "tensordesc" parameter: sizes and strides in elements, the last stride 1."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


Argument = int | float | TensorView


class Driver(Protocol):
    """The part of the CUDA driver that launching takes; cuda_driver.CudaDriver is the real one."""

    def load(self, binary: Binary, code: bytes) -> Any:
        """A kernel ready to be launched, its shared memory granted."""

    def encode_tensor_map(self, view: TensorView, encoding: Mapping[str, Any]) -> bytes:
        """The 128 bytes of a CUtensorMap."""

    def launch(
        self, kernel: Any, binary: Binary, grid: tuple[int, int, int], stream: int, parameters: "PackedParameters"
    ) -> None:
        """Queues the kernel on a stream, given by its handle."""


class PackedParameters:
    """The parameters of one launch in memory, and the array of their addresses that the driver wants.

    Each value lies at a multiple of its alignment. The object must live until the launch call has returned, which
    copies them.
    """

    def __init__(self, values: list[tuple[bytes, int]]) -> None:
        """`values` are the raw bytes and the alignment of each parameter."""
        offsets, end = [], 0
        for raw, alignment in values:
            end = -(-end // alignment) * alignment
            offsets.append(end)
            end += len(raw)
        self._memory = ctypes.create_string_buffer(end + TENSOR_MAP_ALIGNMENT)
        start = -(-ctypes.addressof(self._memory) // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT
        for (raw, _), offset in zip(values, offsets, strict=True):
            ctypes.memmove(start + offset, raw, len(raw))
        self._pointers = (ctypes.c_void_p * len(values))(*(start + offset for offset in offsets))
        self.sizes = tuple(len(raw) for raw, _ in values)

    @property
    def address(self) -> int:
        """The address of the array of pointers (`void*[]`)."""
        return ctypes.addressof(self._pointers)

    def raw(self, index: int) -> bytes:
        """The bytes that the driver will copy for a parameter."""
        pointer = self._pointers[index]
        return ctypes.string_at(pointer, self.sizes[index]) if pointer is not None else b""


def pack(binary: Binary, arguments: Mapping[str, Argument], driver: Driver, scratch: int = 0) -> PackedParameters:
    """The kernel's parameters by name; raises EngineError for a missing, unknown or unfit one.

    scratch  device memory for the kernel's own use, `binary.scratch_bytes` for each block of the grid
    """
    names = [name for name, _ in binary.parameters]
    if set(arguments) != set(names):
        raise EngineError(f"{binary.name} takes the parameters {', '.join(names)}, got {', '.join(arguments)}.")
    if bool(scratch) != bool(binary.scratch_bytes):
        raise EngineError(f"{binary.name} needs {binary.scratch_bytes} bytes of scratch for each block: allocate that.")
    raw: list[bytes] = []
    encodings = iter(binary.tensor_maps)
    for name, kind in binary.parameters:
        value = arguments[name]
        if kind.startswith("tensordesc"):
            raw += _descriptor(name, kind, value, next(encodings), driver)
        else:
            raw.append(_scalar(name, kind, value))
    raw += [_scalar("global scratch", "u64", scratch), _scalar("profiler scratch", "u64", 0)]
    return PackedParameters([(one, slot.alignment) for one, slot in zip(raw, binary.slots, strict=True)])


def _descriptor(name: str, kind: str, value: Argument, encoding: Mapping[str, Any], driver: Driver) -> list[bytes]:
    rank = len(descriptor_block(name, kind))
    if not isinstance(value, TensorView) or len(value.shape) != rank or len(value.strides) != rank:
        raise EngineError(f"Parameter {name} must be a TensorView of {rank} dimensions, got {value!r}.")
    strides_bytes = [stride * int(encoding["elem_size"]) for stride in value.strides[:-1]]
    if value.strides[-1] != 1 or value.address % POINTER_ALIGNMENT or any(one % 16 for one in strides_bytes):
        raise EngineError(
            f"Parameter {name} must start at, and have rows at, multiples of 16 bytes and a last stride of 1, got "
            f"address {value.address:#x} and strides {value.strides}: pad the rows."
        )
    tensor_map = driver.encode_tensor_map(value, encoding)
    if len(tensor_map) != TENSOR_MAP_BYTES:
        raise EngineError(f"A tensor map has {TENSOR_MAP_BYTES} bytes, the driver made {len(tensor_map)}.")
    sizes = [_scalar(name, "i32", size) for size in value.shape]
    return [tensor_map, *sizes, *(_scalar(name, "i64", stride) for stride in value.strides)]


def _scalar(name: str, kind: str, value: Argument) -> bytes:
    """The value in exactly as many bytes as the machine code reads."""
    if kind.startswith("*"):
        if type(value) is not int or value <= 0 or value % POINTER_ALIGNMENT:
            raise EngineError(f"Parameter {name} must be an address divisible by 16, got {value!r}.")
        return value.to_bytes(8, "little")
    if kind == "bf16" and isinstance(value, int | float):
        return _bf16(float(value))
    if kind in _FLOAT_FORMATS and isinstance(value, int | float):
        return struct.pack(f"<{_FLOAT_FORMATS[kind]}", value)
    if kind in _FLOAT_FORMATS or kind == "bf16" or not isinstance(value, int):
        raise EngineError(f"Parameter {name} must be a number of type {kind}, got {value!r}.")
    try:
        return value.to_bytes(SCALAR_BYTES[kind], "little", signed=kind.startswith("i") and kind != "i1")
    except OverflowError:
        raise EngineError(f"Parameter {name} must fit {kind}, got {value}: the sequence is too long.") from None


def _bf16(value: float) -> bytes:
    """Rounded to nearest even; the upper half of the fp32 pattern."""
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to_bytes(2, "little")
