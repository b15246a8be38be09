"""Results that are kept for repeats of their REQUEST_ID: in memory, and promised ones beyond that in files."""

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import WorkerFailed

Outputs = Mapping[str, NDArray[Any]]

_TEXT: Final = "bytes:"  # prefix, in a file, of the names of BYTES tensors of shape [1]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """A kept result.

    mark       fingerprint of the inputs of its request
    expires_s  when the result is too old, on the clock of KeptResults
    promised   a caller was promised that the result is kept (KEEP_S)
    where      the tensors, or the file that holds them
    """

    mark: bytes
    size_bytes: int
    expires_s: float
    promised: bool
    where: Outputs | Path

    @property
    def outputs(self) -> Outputs:
        """The result itself. Raises WorkerFailed for a file that is gone."""
        return read_result(self.where) if isinstance(self.where, Path) else self.where


class KeptResults:
    """Results by REQUEST_ID. Any thread may call any method.

    ttl_s           how long every result is kept
    max_bytes       of all results in memory together; beyond that the oldest results without a promise are forgotten
    folder          holds promised results for which memory has no room; None: those are lost
    max_file_bytes  of all results in `folder` together
    """

    def __init__(
        self,
        ttl_s: float,
        max_bytes: int,
        folder: Path | None = None,
        max_file_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ttl_s, self._max_bytes = ttl_s, max_bytes
        self._folder, self._max_file_bytes = folder, max_file_bytes if folder is not None else 0
        self._clock = clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the oldest first
        self._in_memory = self._in_files = self._files_made = 0
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Bytes of all results in memory."""
        return self._in_memory

    @property
    def file_bytes(self) -> int:
        """Bytes of all results in files, and of those that are being written."""
        return self._in_files

    def get(self, request_id: str) -> Kept | None:
        """The result of that id; None without one, or where the result is too old."""
        with self._lock:
            self._drop_old()
            return self._kept.get(request_id)

    def put(self, request_id: str, mark: bytes, outputs: Outputs, keep_s: float) -> bool:
        """Keeps a result for the longer of `ttl_s` and `keep_s` (seconds that its callers were promised; 0: none).
        Returns whether there was room; a promised result without room is logged."""
        seconds, size_bytes = max(self._ttl_s, keep_s), size_of(outputs)
        if seconds == 0:
            return False
        promised, expires_s = keep_s > 0, self._clock() + seconds
        with self._lock:
            self._drop(request_id)
            self._drop_old()
            if self._make_room(size_bytes):
                self._in_memory += size_bytes
                self._kept[request_id] = Kept(mark, size_bytes, expires_s, promised, dict(outputs))
                return True
            if not promised:
                return False
            path = self._new_file(size_bytes)
        if path is not None and self._write(path, outputs, size_bytes):
            with self._lock:
                self._kept[request_id] = Kept(mark, size_bytes, expires_s, promised, path)
            return True
        _logger.error("result_lost: %s has %d bytes, for which there is no room left", request_id, size_bytes)
        return False

    def drop(self, request_id: str) -> bool:
        """Forgets a result; whether there was one."""
        with self._lock:
            return self._drop(request_id)

    # The methods below are called with the lock held, but for _write.

    def _make_room(self, size_bytes: int) -> bool:
        """Forgets the oldest results without a promise until memory has room; whether it has."""
        spared = sum(kept.size_bytes for kept in self._kept.values() if kept.promised and _is_in_memory(kept))
        if spared + size_bytes > self._max_bytes:
            return False
        for request_id, kept in list(self._kept.items()):
            if self._in_memory + size_bytes <= self._max_bytes:
                break
            if not kept.promised:
                self._drop(request_id)
        return True

    def _drop_old(self) -> None:
        now_s = self._clock()
        for request_id in [request_id for request_id, kept in self._kept.items() if now_s >= kept.expires_s]:
            self._drop(request_id)

    def _drop(self, request_id: str) -> bool:
        kept = self._kept.pop(request_id, None)
        if kept is None:
            return False
        if isinstance(kept.where, Path):
            self._in_files -= kept.size_bytes
            kept.where.unlink(missing_ok=True)
        else:
            self._in_memory -= kept.size_bytes
        return True

    def _new_file(self, size_bytes: int) -> Path | None:
        """A path for a file of that many bytes, which count from now on; None without room."""
        if self._folder is None or self._in_files + size_bytes > self._max_file_bytes:
            return None
        self._in_files += size_bytes
        self._files_made += 1
        return self._folder / f"{self._files_made}.npz"

    def _write(self, path: Path, outputs: Outputs, size_bytes: int) -> bool:
        try:
            write_result(path, outputs)
        except OSError:  # a full disk; logged with its reason
            _logger.exception("a result could not be written")
            with contextlib.suppress(OSError):
                path.unlink()
            with self._lock:
                self._in_files -= size_bytes
            return False
        return True


def size_of(outputs: Outputs) -> int:
    """Bytes of all tensors; of BYTES tensors those of their values."""
    return sum(
        sum(len(value) for value in array.flat) if array.dtype == np.object_ else array.nbytes
        for array in outputs.values()
    )


def write_result(path: Path, outputs: Outputs) -> None:
    """One file for its owner alone, without pickles. BYTES tensors have shape [1]."""
    arrays = {
        f"{_TEXT}{name}" if array.dtype == np.object_ else name: (
            np.frombuffer(array.flat[0], np.uint8) if array.dtype == np.object_ else array
        )
        for name, array in outputs.items()
    }
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("xb") as file:
        path.chmod(0o600)
        np.savez(file, **arrays)


def read_result(path: Path) -> Outputs:
    """What `write_result` wrote. Raises WorkerFailed where the file is gone."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {
                name.removeprefix(_TEXT): (
                    np.array([arrays[name].tobytes()], np.object_) if name.startswith(_TEXT) else arrays[name]
                )
                for name in arrays.files
            }
    except FileNotFoundError:
        raise WorkerFailed("The kept result must still be there, it has just gone: send the request again.") from None


def _is_in_memory(kept: Kept) -> bool:
    return not isinstance(kept.where, Path)
