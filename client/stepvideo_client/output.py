"""Files that a generation leaves: checked before the server is asked, written whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stepvideo_client.errors import InvalidInput
from stepvideo_client.events import Result


def check_target(path: Path, what: str) -> None:
    """Raises InvalidInput unless a file `path` can be written; `what` names it in the message."""
    if path.is_dir():
        raise InvalidInput(f"{what} must be a file, and {str(path)!r} is a folder.")
    folder = path.parent
    if not folder.is_dir():
        raise InvalidInput(f"{what} must be in a folder that exists, and {str(folder)!r} does not: create it first.")
    if not os.access(folder, os.W_OK):
        raise InvalidInput(f"{what} must be in a folder that can be written to, and {str(folder)!r} cannot.")


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
    """Writes a temporary file beside `path` and renames it, so that nobody sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
            size = file.tell()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return size
