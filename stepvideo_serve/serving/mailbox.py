"""The responses of a run, kept until its caller fetches them, one at a time.

Calls between models are one request and one response each. With a stream of responses (`exec(decoupled=True)`) the
caller's process can stand still for ever: Triton's Python backend then takes the interpreter's lock, the lock of its
table of streams and that of a stream in different orders (`Stub::GetResponseIterator`, `ResponseIterator::Next` and
`Stub::ProcessBLSResponseDecoupled`).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

HOLD_S = 0.25  # how long a fetch waits for something; each holds one of the server's 32 threads for the caller's calls
UNFETCHED_S = 120.0  # how long the end of a run waits for its caller
ENDED = "ENDED"

Outputs = dict[str, NDArray[Any]]

_logger = logging.getLogger(__name__)


class Reply(Protocol):
    """The one response to a fetch."""

    def finish(self, outputs: Outputs) -> None: ...
    def fail(self, error: BaseException) -> None: ...


class Mailbox:
    """What a run answers, in order: outputs, then an error or the output ENDED, which is the last.

    Any thread may call. A thread of its own replies: a reply to a caller whose process has died never returns.
    `gone()` is called, once started, when nothing will be replied any more.
    """

    def __init__(self, gone: Callable[[], None]) -> None:
        self._gone = gone
        self._letters: deque[Outputs | BaseException] = deque()
        self._fetches: deque[tuple[Reply, float]] = deque()  # with the time that each may wait until
        self._complete = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._deliver, name="mailbox", daemon=True)

    def start(self) -> None:
        """Once the run has been accepted: from now on there are replies."""
        self._thread.start()

    def send(self, outputs: Outputs) -> None:
        """Does nothing after the last."""
        self._put(outputs, last=False)

    def fail(self, error: BaseException) -> None:
        """The last."""
        self._put(error, last=True)

    def close(self) -> None:
        """The last, if there was no error."""
        self._put({ENDED: np.array([True])}, last=True)

    def fetch(self, reply: Reply) -> None:
        """Replies with the next of the run's answers, or with nothing after HOLD_S."""
        with self._changed:
            self._fetches.append((reply, time.monotonic() + HOLD_S))
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Until all has been fetched; at once if never started."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _put(self, letter: Outputs | BaseException, last: bool) -> None:
        with self._changed:
            if not self._complete:
                self._complete = last
                self._letters.append(letter)
                self._changed.notify()

    def _deliver(self) -> None:
        try:
            while (pair := self._next()) is not None:
                reply, letter = pair
                try:
                    if isinstance(letter, BaseException):
                        reply.fail(letter)
                    else:
                        reply.finish(letter)
                except Exception:  # the caller will ask why nothing came
                    _logger.exception("an answer could not be sent")
        finally:
            self._gone()

    def _next(self) -> tuple[Reply, Outputs | BaseException] | None:
        """Waits for a fetch and for something to reply; None after the last, or when nobody comes for it."""
        with self._changed:
            while True:
                if self._complete and not self._letters:
                    return None
                if self._fetches and self._letters:
                    return self._fetches.popleft()[0], self._letters.popleft()
                now_s = time.monotonic()
                if self._fetches and self._fetches[0][1] <= now_s:
                    return self._fetches.popleft()[0], {}
                wait_s = self._fetches[0][1] - now_s if self._fetches else UNFETCHED_S
                if not self._changed.wait(wait_s) and not self._fetches and self._complete:
                    return None
