"""What a launcher makes outside its own memory: a folder for temporary files, and the shared memory of its server.

A launcher that is ended by SIGKILL leaves both. So each start claims what it makes, and the next start removes what no
living process owns. A claim is a file in /dev/shm that is locked for as long as the launcher, its server or a model's
process has the file open: the kernel takes the lock back however these end, and the numbers of processes, which
containers give out again, do not matter.
"""

import contextlib
import fcntl
import os
import re
import shutil
import stat
from pathlib import Path

from stepvideo_serve.errors import SetupError

SHARED_MEMORY = Path("/dev/shm")
CLAIM = "claim"
CLAIM_NAME = re.compile(rf"(stepvideo_\d+_[0-9a-f]+)_{CLAIM}")
MAX_PATH_BYTES = 4096


class Claim:
    """Owns the shared memory whose names begin with `name` and "_", and the folder at `folder`, which must be called
    `name` and need not exist yet. `fd` is for every process that shares them. Raises SetupError."""

    def __init__(self, name: str, folder: Path) -> None:
        self._path = SHARED_MEMORY / f"{name}_{CLAIM}"
        try:
            self.fd = _locked(self._path)
            os.write(self.fd, os.fsencode(folder))
        except OSError as error:
            raise SetupError(
                f"{SHARED_MEMORY} must be a folder for shared memory, but no file could be made in it "
                f"({error.strerror}): mount a tmpfs there."
            ) from None

    def release(self) -> None:
        """Once nothing is left of what was claimed."""
        self._path.unlink(missing_ok=True)
        os.close(self.fd)


def remove_leftovers() -> None:
    """Removes what this user's launchers have left and no living process owns. What cannot be removed stays."""
    for path in SHARED_MEMORY.glob(f"stepvideo_*_{CLAIM}"):
        if (found := CLAIM_NAME.fullmatch(path.name)) is not None:
            with contextlib.suppress(OSError):
                _remove_unless_owned(path, found[1])


def _locked(path: Path) -> int:
    """A new file, locked. Somebody who removes leftovers may be faster between the two: then once more."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if _is_at(path, fd):
            return fd
        os.close(fd)


def _remove_unless_owned(path: Path, name: str) -> None:
    """Raises OSError for a file that is gone, locked, or another user's."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_uid != os.geteuid() or not _is_at(path, fd):
            return
        folder = Path(os.fsdecode(os.read(fd, MAX_PATH_BYTES)))
        if folder.name == name and _is_own_folder(folder):
            shutil.rmtree(folder, ignore_errors=True)
        for region in SHARED_MEMORY.glob(f"{name}_*"):
            if region != path:
                region.unlink(missing_ok=True)
        path.unlink()  # last: whoever is killed in the middle leaves the claim for the next
    finally:
        os.close(fd)


def _is_at(path: Path, fd: int) -> bool:
    """Whether the open file still has this name."""
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _is_own_folder(path: Path) -> bool:
    try:
        found = path.stat(follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
