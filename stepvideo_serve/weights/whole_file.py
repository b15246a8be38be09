"""What stands in the place of a checkpoint's files without being them."""

from pathlib import Path

from stepvideo_serve.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_whole(path: Path) -> None:
    """Raises CheckpointError for a pointer of Git LFS, which is what a clone without git-lfs has instead of a large
    file. A file that is absent or cannot be read is left to whoever reads it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError:
        return
    if start == LFS_POINTER:
        raise CheckpointError(f"{path} must be the file itself, found a pointer of Git LFS: run git lfs pull there.")


def is_hidden(path: Path) -> bool:
    """Whether the name begins with a dot, as those of the `._` files that macOS writes beside each file do."""
    return path.name.startswith(".")
