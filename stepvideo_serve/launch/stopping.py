"""How a server that is told to stop lets go: new requests are refused, those that it has accepted end first.

Triton refuses the calls between its models from the moment it is told to stop, and every step of a request is such a
call. So the launcher raises a sign before it tells Triton: an empty file in a folder that only its own user may enter.
The public models look for it at every request. No request can raise it.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from stepvideo_serve.errors import ServiceUnavailable, SetupError
from stepvideo_serve.launch.health import PUBLIC_MODELS, State, ask

VARIABLE = "STEPVIDEO_STOP_SIGN"
LINKS_VARIABLE = "STEPVIDEO_LINKS"  # where models put links with names in ASCII: config.py
LOOK_S = 0.1
ANSWER_S = 5.0


def shutting_down() -> ServiceUnavailable:
    """The answer to a request that comes too late."""
    return ServiceUnavailable("The server is shutting down: send the request to another one.")


class StopSign:
    """A file: there or not. A path of None never is."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @classmethod
    def from_environment(cls) -> "StopSign":
        """The one that the launcher of this process may raise; in a server started by something else there is none."""
        path = os.environ.get(VARIABLE)
        return cls(Path(path) if path else None)

    def raised(self) -> bool:
        """Whether the server lets go."""
        return self._path is not None and self._path.exists()


class LauncherFolder:
    """The launcher's side: a folder called `name` for the sign, among the temporary files, and made by `make`; the
    models may put links into the folder."""

    def __init__(self, name: str) -> None:
        self.path = Path(tempfile.gettempdir(), name)
        self.sign = self.path / "stop"

    def make(self) -> None:
        """Raises SetupError where no folder can be made, or this one is there."""
        try:
            self.path.mkdir(mode=0o700)  # nobody else may enter it
        except OSError as error:
            raise SetupError(
                f"A folder for temporary files must be writable, found none ({error.strerror}): set TMPDIR to one."
            ) from None

    @property
    def environment(self) -> dict[str, str]:
        """What the server's processes are told about the folder."""
        return {VARIABLE: str(self.sign), LINKS_VARIABLE: str(self.path)}

    def raise_sign(self) -> None:
        """From now on the public models refuse new requests."""
        self.sign.touch()

    def remove(self) -> None:
        """Removes the folder; harmless when it is gone."""
        shutil.rmtree(self.path, ignore_errors=True)


def unanswered(http_url: str) -> int:
    """How many requests the public models have accepted and not answered; one for a model that does not say."""
    count = 0
    for model in PUBLIC_MODELS:
        answer = ask(http_url, model, ANSWER_S)
        if answer.state is State.SILENT:
            count += 1
        elif answer.state is State.WELL:  # a model that is not there, or has lost its process, will answer nobody
            count += int(answer.report.get("unanswered", 0))
    return count


def wait_until_answered(http_url: str, deadline_s: float, running: Callable[[], bool]) -> None:
    """Returns when all accepted requests are answered, at deadline_s (time.monotonic()), or when the server is not
    `running` any more."""
    while running() and unanswered(http_url) and (left_s := deadline_s - time.monotonic()) > 0:
        time.sleep(min(LOOK_S, left_s))
