"""Pictures and videos in a folder: one subfolder per job, files whole or not there."""

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from stepvideo_gateway.errors import Unavailable

INPUT, VIDEO, THUMBNAIL, SPRITESHEET = "input", "video.mp4", "thumbnail.webp", "spritesheet.webp"
LAST_FRAME = "last_frame.png"
PROBE_BYTES = 4096
FOLDERS, FORGOTTEN_MOST = "video_", 500


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

    def check(self) -> None:
        """Raises Unavailable while files cannot be written."""
        probe = self.folder / f".probe.{secrets.token_hex(8)}"
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
            probe.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                probe.unlink()
            raise self._away(error) from error

    def write(self, job_id: str, name: str, content: bytes) -> Path:
        """Writes a file whole, on the disk when this returns. A job's folder is made for its picture only: what comes
        after `remove` is written nowhere. Raises Unavailable, when nothing is left of the file."""
        path = self.path(job_id, name)
        unfinished = path.with_name(f".{name}.{secrets.token_hex(8)}")
        try:
            if name == INPUT:
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
            raise self._away(error) from error
        return path

    def read(self, job_id: str, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        try:
            return self.path(job_id, name).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, job_id: str) -> None:
        """Removes all files of a job, also those that somebody is about to write: the folder first gets another name.
        Raises Unavailable while something is left."""
        folder = self.path(job_id, "")
        going = self.folder / f".{job_id}"
        shutil.rmtree(going, ignore_errors=True)  # left by an earlier attempt
        try:
            with contextlib.suppress(FileNotFoundError):
                folder.rename(going)
        except OSError as error:
            raise self._away(error) from error
        shutil.rmtree(going, ignore_errors=True)
        if going.exists() or folder.exists():
            raise Unavailable(f"The files of {job_id} could not be removed.", retry_after_s=10)

    def forgotten(self, before: float) -> list[str]:
        """Ids of jobs of which there is at most a picture, from before then (unix seconds); not all at a time."""
        found: list[str] = []
        with contextlib.suppress(OSError):  # the folder is away
            for folder in self.folder.iterdir():
                if len(found) == FORGOTTEN_MOST:
                    break
                with contextlib.suppress(OSError):  # the folder is being removed
                    old = folder.name.startswith(FOLDERS) and folder.stat().st_mtime < before
                    if old and all(name == INPUT or name.startswith(f".{INPUT}.") for name in os.listdir(folder)):
                        found.append(folder.name)
        return found

    def _away(self, error: OSError) -> Unavailable:
        return Unavailable(f"The folder of videos cannot be written: {error.strerror}.", retry_after_s=10)
