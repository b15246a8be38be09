"""SHA-256 of large files, computed once for all processes of a server.

Ranks that are started anew, and ranks beside each other, read the same files of many gigabytes. A hash is recorded with
the file's device, inode, size and time of its last change; while these are the same, nobody reads the
file again. The records lie in the server's own folder and go with it, so that every start of a server hashes once.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepvideo_serve.weights.files import file_digest


class KnownDigests:
    """`folder`: where records lie, made when first needed; None keeps none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def __call__(self, path: Path) -> str:
        """SHA-256 of the file in hex. Raises OSError where it cannot be read."""
        if self._folder is None:
            return file_digest(path)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        record = self._folder / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()
        with _alone(record.with_suffix(".lock")):  # of several processes one hashes, the others wait for its record
            state = _state(path)
            known = _recorded(record)
            if known is not None and known[0] == state:
                return known[1]
            digest = file_digest(path)
            if _state(path) == state:  # else it changed meanwhile, and belongs to neither state
                _save(record, state, digest)
            return digest


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def _recorded(record: Path) -> tuple[list[int], str] | None:
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        return [int(value) for value in data["state"]], str(data["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save(record: Path, state: list[int], digest: str) -> None:
    temporary = record.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"state": state, "sha256": digest}), encoding="utf-8")
        os.replace(temporary, record)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
