"""Tensors in anonymous shared memory.

The memory is a memfd: it has no name in any file system (nothing appears in /dev/shm, whose size limit does not apply
either) and is gone with the last process that maps it, however that one dies. Its size is fixed when it is made; pages
that were never written cost nothing, so the size may be generous.

An arena holds one message's tensors at a time, written by one side and read by the other. It does no locking: the
channel's messages say which side may write (see group.py and rank_process.py).
"""

import mmap
import os
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, TypedDict

import numpy as np

from stepvideo_serve.errors import InvalidRequest

ALIGNMENT_BYTES = 64
DTYPES = frozenset(
    {
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    }
)

Array = np.ndarray[Any, np.dtype[Any]]


class TensorEntry(TypedDict):
    """Where a tensor lies in the arena; `offset` in bytes, C order, native byte order."""

    name: str
    dtype: str
    shape: list[int]
    offset: int


class Arena:
    """One region of shared memory of `size_bytes`. The arena owns the file descriptor."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        try:
            self._memory = mmap.mmap(fd, size_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create(cls, name: str, size_bytes: int) -> "Arena":
        """New memory; `name` is shown in /proc/PID/maps and need not be unique."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, size_bytes)

    def write(self, tensors: Mapping[str, Array]) -> list[TensorEntry]:
        """Copy the tensors in (overwriting what was there) and describe them.

        Raises InvalidRequest, before anything is overwritten, for a dtype outside DTYPES or when they do not fit.
        """
        entries: list[TensorEntry] = []
        end_bytes = 0
        for name, tensor in tensors.items():
            if tensor.dtype.name not in DTYPES:
                raise InvalidRequest(
                    f"Tensor {name!r} must have one of the types {', '.join(sorted(DTYPES))}, got {tensor.dtype.name}: "
                    f"convert it first."
                )
            offset = -(-end_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            entries.append({"name": name, "dtype": tensor.dtype.name, "shape": list(tensor.shape), "offset": offset})
            end_bytes = offset + tensor.nbytes
        if end_bytes > self.size_bytes:
            raise InvalidRequest(
                f"The tensors {', '.join(tensors)} need {end_bytes} bytes of shared memory and {self.size_bytes} are "
                f"available: ask for a smaller video, or raise arena_bytes."
            )
        for entry in entries:
            self._view(entry)[...] = tensors[entry["name"]]
        return entries

    def read(self, entries: Iterable[TensorEntry]) -> dict[str, Array]:
        """Copies of the tensors, owned by the caller; ValueError for an entry that is not inside the arena."""
        return {entry["name"]: self._view(entry).copy() for entry in entries}

    def close(self) -> None:
        """Unmap and close; calling it again does nothing."""
        if not self._memory.closed:
            self._memory.close()
            os.close(self.fd)

    def _view(self, entry: TensorEntry) -> Array:
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"A tensor entry must name one of {sorted(DTYPES)}, got {entry['dtype']!r}.")
        shape, dtype, offset = entry["shape"], np.dtype(entry["dtype"]), entry["offset"]
        end_bytes = offset + prod(shape) * dtype.itemsize
        if min(offset, *shape, 0) < 0 or end_bytes > self.size_bytes:  # numpy does not check a negative offset
            raise ValueError(f"A tensor entry must lie in the {self.size_bytes} bytes of the arena, got {entry}.")
        if 0 in shape:
            return np.empty(shape, dtype)  # a buffer of no bytes cannot be taken at the very end of the memory
        return np.ndarray(shape, dtype, buffer=self._memory, offset=offset)
