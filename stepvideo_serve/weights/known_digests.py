"""SHA-256 of large files, computed once for all processes of a server.

Ranks that are started anew, and ranks beside each other, read the same files of many gigabytes. A hash is recorded with
the file's device, inode, size and times of its last change, that of its content and that of its inode, which nobody can
set back; while these are the same, nobody hashes the file again. The records lie in the server's own folder and go with
it, so that every start of a server hashes once.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from typing import BinaryIO, TypeVar

from stepvideo_serve.weights.files import file_digest

Content = TypeVar("Content", bytes, mmap)
State = list[int]


class KnownDigests:
    """`folder`: where records lie, made when first needed; None keeps none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def __call__(self, path: Path) -> str:
        """SHA-256 of the file in hex. Raises OSError where it cannot be read."""
        if self._folder is None:
            return file_digest(path)
        with _record_of(path, self._folder) as record:
            return _digest(record, _state(path.stat()), lambda: _state(path.stat()), lambda: file_digest(path))

    def read(self, file: BinaryIO, read: Callable[[], Content]) -> tuple[Content, str]:
        """What `read` makes of an open file, all of it, and its SHA-256 in hex: it need not be computed where the file
        stayed what it was while it was read. Raises OSError where it cannot be read."""
        before, content = _state(os.fstat(file.fileno())), read()

        def hashed() -> str:
            return hashlib.sha256(content).hexdigest()

        if self._folder is None:
            return content, hashed()
        with _record_of(Path(file.name), self._folder) as record:
            return content, _digest(record, before, lambda: _state(os.fstat(file.fileno())), hashed)


@contextmanager
def _record_of(path: Path, folder: Path) -> Iterator[Path]:
    """Where the record of a file is, or will be; of several processes one hashes, the others wait for its record."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    record = folder / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()
    with record.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield record


def _digest(record: Path, before: State, state: Callable[[], State], hashed: Callable[[], str]) -> str:
    """The recorded hash of a file that was in the state `before`, and still is; else a new one, which is recorded
    unless the file changed meanwhile, and belongs to neither state."""
    known = _recorded(record)
    if known is not None and known[0] == before == state():
        return known[1]
    digest = hashed()
    if state() == before:
        _save(record, before, digest)
    return digest


def _state(found: os.stat_result) -> State:
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _recorded(record: Path) -> tuple[State, str] | None:
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        return [int(value) for value in data["state"]], str(data["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save(record: Path, state: State, digest: str) -> None:
    temporary = record.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"state": state, "sha256": digest}), encoding="utf-8")
        os.replace(temporary, record)
    finally:
        temporary.unlink(missing_ok=True)
