"""Pictures and videos in a folder: one subfolder per job, files whole or not there."""

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from stepvideo_gateway.errors import Unavailable

INPUT, VIDEO, THUMBNAIL, SPRITESHEET = "input", "video.mp4", "thumbnail.webp", "spritesheet.webp"


class Store:
    """Files of jobs. A job's id has letters, digits and _ only, so no path leads out of the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Makes the folder. Raises Unavailable."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"The folder of videos {self.folder} must be writable: {error.strerror}.") from error

    def path(self, job_id: str, name: str) -> Path:
        """Where a file of a job is, or would be."""
        if not job_id.replace("_", "").isalnum():
            raise ValueError(f"a job's id has letters, digits and _, got {job_id!r}")
        return self.folder / job_id / name

    def write(self, job_id: str, name: str, content: bytes) -> Path:
        """Writes a file whole, on the disk when this returns. Raises Unavailable, when nothing is left of it."""
        path = self.path(job_id, name)
        unfinished = path.with_name(f".{name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with unfinished.open("xb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise Unavailable(f"The folder of videos cannot be written: {error.strerror}.", retry_after_s=10) from error
        return path

    def read(self, job_id: str, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        try:
            return self.path(job_id, name).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, job_id: str) -> None:
        """Removes all files of a job."""
        shutil.rmtree(self.path(job_id, ""), ignore_errors=True)
