"""Files that a generation leaves: checked before the server is asked, written whole or not at all.

What is there and is no regular file (a device, a pipe, a socket's end) is written to, never replaced; a link is
followed; "-" is standard output. What is not yet whole has a name that nobody can foresee, and so put something else in
its place; a file that is replaced keeps its mode.
"""

import io
import json
import os
import secrets
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stepvideo_client.errors import InvalidInput
from stepvideo_client.events import Result

STANDARD_OUTPUT = Path("-")


def check_target(path: Path, what: str) -> None:
    """Raises InvalidInput unless a file `path` can be written; `what` names it in the message."""
    if path == STANDARD_OUTPUT:
        return
    if path.is_dir():
        raise InvalidInput(f"{what} must be a file, and {str(path)!r} is a folder.")
    if is_written_in_place(path):
        if not os.access(path, os.W_OK):
            raise InvalidInput(f"{what} must be writable, and {str(path)!r} is not.")
        return
    folder = _target(path).parent
    if not folder.is_dir():
        raise InvalidInput(f"{what} must be in a folder that exists, and {str(folder)!r} does not: create it first.")
    if not os.access(folder, os.W_OK):
        raise InvalidInput(f"{what} must be in a folder that can be written to, and {str(folder)!r} cannot.")


def is_written_in_place(path: Path) -> bool:
    """Whether `path` is there and must stay what it is: no regular file, or a name of this process's open files."""
    return path == STANDARD_OUTPUT or (path.exists() and (not path.is_file() or path.parts[:2] == ("/", "dev")))


def save_result(path: Path, result: Result) -> int:
    """Writes the mp4 as it is, or the array as .npy. Returns the bytes written."""
    data = result.data
    if isinstance(data, bytes):
        content = data
        return _write_whole(path, lambda file: file.write(content))
    array = data
    return _write_whole(path, lambda file: np.save(file, array, allow_pickle=False))


def save_bytes(path: Path, content: bytes) -> int:
    """Writes `content` and returns its length."""
    return _write_whole(path, lambda file: file.write(content))


def save_json(path: Path, value: dict[str, Any]) -> int:
    """Writes an indented UTF-8 JSON file and returns its size in bytes."""
    return save_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> int:
    """Writes a temporary file beside the target and renames it, so that nobody sees half a file."""
    if is_written_in_place(path):
        return _write_in_place(path, write)
    target = _target(path)
    temporary = target.with_name(f".stepvideo.{secrets.token_hex(8)}.part")
    try:
        with _new_file(temporary, target) as file:
            write(file)
            size = file.tell()
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _new_file(path: Path, target: Path) -> BinaryIO:
    """A file that was not there, with the mode of the `target` from its first byte on, where there is one."""
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600), "wb")
    if mode is not None:
        os.fchmod(file.fileno(), mode)
    return file


def _write_in_place(path: Path, write: Callable[[BinaryIO], object]) -> int:
    whole = io.BytesIO()  # a pipe has no position, which numpy asks for
    write(whole)
    content = whole.getvalue()
    if path == STANDARD_OUTPUT:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        with path.open("wb") as file:
            file.write(content)
    return len(content)


def _target(path: Path) -> Path:
    """Where a link leads to."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path
