"""Files that a command leaves: checked before the work, written whole or not at all.

A symbolic link is followed. What exists and is no regular file (a device, a pipe) is written to, never replaced.
"""

import io
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import InvalidRequest


def is_special(path: Path) -> bool:
    """Whether the path exists and is neither a regular file nor a folder."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_target(path: Path, option: str) -> None:
    """InvalidRequest unless a file can be written at the path; `option` names the path in the sentence."""
    if path.is_dir():
        raise InvalidRequest(f"{option} must be a file, got the folder {path}: name a file in that folder.")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise InvalidRequest(f"{option} must be in a folder that exists, got {path}: create {folder} first.")
    if not os.access(path if is_special(path) else folder, os.W_OK):
        raise InvalidRequest(f"{option} must be where this user may write, got {path}: choose another place.")


def write_file(path: Path, content: bytes | NDArray[Any]) -> int:
    """Writes the bytes as they are, an array as .npy, and returns how many bytes were written. Raises OSError."""
    data = content if isinstance(content, bytes) else _npy(content)
    if is_special(path):
        with path.open("wb") as file:
            file.write(data)
    else:
        _write_whole(Path(os.path.realpath(path)), data)
    return len(data)


def _npy(array: NDArray[Any]) -> bytes:
    """The .npy file of an array, made in memory: a pipe takes no writes in place."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _write_whole(target: Path, data: bytes) -> None:
    """Writes a temporary file beside the target and renames it, so that nobody sees half a file."""
    temporary = target.with_name(f".stepvideo.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:  # a name that nobody could foresee and take
            file.write(data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
