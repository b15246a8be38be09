"""A thread that ends by an exception no longer does its part for the model, while the process lives on and answers.

So the process remembers the first such thread and refuses probes from then on; the supervisor or the liveness probe
then has the model loaded anew.
"""

import logging
import threading

from stepvideo_serve.errors import WorkerFailed
from stepvideo_serve.launch.health import LOST_THREAD

_logger = logging.getLogger(__name__)


class ThreadDeaths:
    """Hears of every thread of this process that ends by an exception, logs it, and remembers the first."""

    def __init__(self) -> None:
        self._first: str | None = None

    @classmethod
    def watched(cls) -> "ThreadDeaths":
        """From now on for the whole process, which has one model."""
        deaths = cls()
        threading.excepthook = deaths.note
        return deaths

    @property
    def none(self) -> bool:
        """Whether all threads are well, or have ended in order."""
        return self._first is None

    def check(self, model: str) -> None:
        """Raises WorkerFailed, in the words that the health check looks for, once a thread has died."""
        if self._first is not None:
            raise WorkerFailed(f"{model} {LOST_THREAD}, {self._first}: load the model anew.")

    def note(self, death: threading.ExceptHookArgs) -> None:
        """Called by Python in the thread that dies."""
        if death.exc_type is SystemExit or death.exc_value is None:
            return
        name = "?" if death.thread is None else death.thread.name
        if self._first is None:
            self._first = f"{name} ({death.exc_type.__name__})"
        _logger.error("thread_died: %s", name, exc_info=death.exc_value)
