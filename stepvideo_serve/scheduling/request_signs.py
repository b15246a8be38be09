"""Signs by which one model of a server cancels what another one knows under a REQUEST_ID.

`ti2v` and `ti2v_unary` know runs and kept results, `ti2v_cancel` is asked to end them, and Triton's models cannot call
a model that streams. So they meet in a folder that only the server's own user may enter: for each id that a model
knows it holds an empty file there, and `ti2v_cancel` puts a second one beside it. Names are digests of the ids.
"""

import hashlib
from pathlib import Path

CANCELLED = ".cancelled"


class RequestSigns:
    """The signs of one model. With a `folder` of None, in a server that something else than the launcher started, there
    are no signs, and nothing can be cancelled by its id. Any thread may call any method."""

    def __init__(self, folder: Path | None, model: str) -> None:
        self._folder, self._model = folder, model

    def begin(self) -> None:
        """Makes the folder, and removes the signs of a process of this model that was there before."""
        if self._folder is None:
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for left in (*self._folder.glob(f"*.{self._model}"), *self._folder.glob(f"*.{self._model}{CANCELLED}")):
            left.unlink(missing_ok=True)

    def know(self, request_id: str) -> None:
        """Puts the sign: the model has a run or a result of that id."""
        if self._folder is not None:
            self._path(request_id).touch(mode=0o600)

    def forget(self, request_id: str) -> None:
        """Removes the sign: the model has neither a run nor a result of that id any more."""
        if self._folder is not None:
            self._path(request_id).unlink(missing_ok=True)
            self._cancelled(request_id).unlink(missing_ok=True)

    def take_cancelled(self, request_id: str) -> bool:
        """Whether the id was cancelled since the last call of this method."""
        if self._folder is None:
            return False
        try:
            self._cancelled(request_id).unlink()
        except FileNotFoundError:
            return False
        return True

    def _path(self, request_id: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{digest_of(request_id)}.{self._model}"

    def _cancelled(self, request_id: str) -> Path:
        path = self._path(request_id)
        return path.with_name(path.name + CANCELLED)


def cancel(folder: Path, request_id: str) -> list[str]:
    """Marks the id as cancelled for every model that knows it; returns the names of these models."""
    models = []
    for path in sorted(folder.glob(f"{digest_of(request_id)}.*")):
        if not path.name.endswith(CANCELLED):
            path.with_name(path.name + CANCELLED).touch(mode=0o600)
            models.append(path.suffix.removeprefix("."))
    return models


def digest_of(request_id: str) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(request_id.encode()).hexdigest()
