"""The responses of a run, kept until its caller fetches them, one at a time. Free of Triton, for tests."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import WorkerFailed
from stepvideo_serve.scheduling.run_queue import Waiting

HOLD_S = 0.25  # how long a fetch waits for a letter; each holds one of 32 threads that the server has for calls
UNFETCHED_S = 120.0  # how long the letters of a run that has ended wait for a fetch
ENDED = "ENDED"

Outputs = dict[str, NDArray[Any]]

_logger = logging.getLogger(__name__)


class Reply(Protocol):
    """The one response to a fetch."""

    def finish(self, outputs: Outputs) -> None: ...
    def waiting(self, waiting: Waiting) -> None: ...
    def fail(self, error: BaseException) -> None: ...


Letter = Outputs | Waiting | BaseException


class Backlog:
    """Bounds the bytes of outputs that wait in all mailboxes of a model together. Any thread may call."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """The bytes that wait now."""
        return self._bytes

    def take(self, letter: "Letter") -> bool:
        """Whether there is room for the letter. If so, its bytes count until `give_back`."""
        size = _size(letter)
        with self._lock:
            if size and self._bytes + size > self.max_bytes:
                return False
            self._bytes += size
            return True

    def give_back(self, letters: Iterable["Letter"]) -> None:
        """Letters were fetched or thrown away: their bytes count no more."""
        with self._lock:
            self._bytes -= sum(map(_size, letters))


def _size(letter: "Letter") -> int:
    return sum(array.nbytes for array in letter.values()) if isinstance(letter, dict) else 0


@dataclass(frozen=True)
class Fetch:
    """A caller that asks for the next letter; until_s: time.monotonic() until which the caller may be kept waiting."""

    reply: Reply
    until_s: float


class Mailbox:
    """The letters of a run, in order: outputs and places in the queue, and last an error or the output ENDED.

    Any thread may call. A thread of the mailbox replies to fetches, because a reply to a caller whose process has died
    never returns. Once started, the mailbox calls `gone()` when it will not reply any more. Outputs for which `backlog`
    has no room are replaced by an error, the last letter; letters that wait are then thrown away.
    """

    def __init__(self, gone: Callable[[], None], backlog: Backlog) -> None:
        self._gone, self._backlog = gone, backlog
        self._letters: deque[Letter] = deque()
        self._fetches: deque[Fetch] = deque()
        self._complete = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._deliver, name="mailbox", daemon=True)

    def start(self) -> None:
        """Begins to reply; to be called once the run has been accepted."""
        self._thread.start()

    def send(self, outputs: Outputs) -> None:
        """Adds outputs; does nothing after the last letter."""
        self._put(outputs, last=False)

    def waiting(self, waiting: Waiting) -> None:
        """Adds the place of a run that waits; does nothing after the last letter."""
        self._put(waiting, last=False)

    def fail(self, error: BaseException) -> None:
        """Adds an error, as the last letter."""
        self._put(error, last=True)

    def close(self) -> None:
        """Adds ENDED, as the last letter; does nothing after an error."""
        self._put({ENDED: np.array([True])}, last=True)

    def fetch(self, reply: Reply) -> None:
        """Replies with the next letter, as soon as there is one, or with no outputs after HOLD_S."""
        with self._changed:
            self._fetches.append(Fetch(reply, time.monotonic() + HOLD_S))
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Waits until all letters were fetched, `timeout_s` at most; returns at once where `start` was not called."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _put(self, letter: Letter, last: bool) -> None:
        with self._changed:
            if self._complete:
                return
            if not self._backlog.take(letter):
                self._throw_away()
                mib = self._backlog.max_bytes >> 20
                letter = WorkerFailed(f"At most {mib} MiB of answers may wait to be fetched: fetch faster.")
                last = True
            self._complete = last
            self._letters.append(letter)
            self._changed.notify()

    def _throw_away(self) -> None:
        """Forgets the letters that wait. The caller holds the lock."""
        self._backlog.give_back(self._letters)
        self._letters.clear()

    def _deliver(self) -> None:
        try:
            while (pair := self._next()) is not None:
                reply, letter = pair
                try:
                    if isinstance(letter, BaseException):
                        reply.fail(letter)
                    elif isinstance(letter, Waiting):
                        reply.waiting(letter)
                    else:
                        reply.finish(letter)
                except Exception:  # the caller notices that no reply came, and asks (model_calls.py)
                    _logger.exception("an answer could not be sent")
        finally:
            with self._changed:
                self._complete = True
                unanswered = list(self._fetches)
                self._fetches.clear()
                left = list(self._letters)
                self._letters.clear()
            self._gone()
            self._backlog.give_back(left)
            for fetch in unanswered:
                fetch.reply.fail(WorkerFailed("The run has ended, there is nothing to fetch: see the server's log."))

    def _next(self) -> tuple[Reply, Letter] | None:
        """Waits for a fetch and a letter; None after the last letter, or UNFETCHED_S without a fetch after the end."""
        with self._changed:
            while True:
                if self._complete and not self._letters:
                    return None
                if self._fetches and self._letters:
                    letter = self._letters.popleft()
                    self._backlog.give_back([letter])
                    return self._fetches.popleft().reply, letter
                now_s = time.monotonic()
                if self._fetches and self._fetches[0].until_s <= now_s:
                    return self._fetches.popleft().reply, {}
                wait_s = self._fetches[0].until_s - now_s if self._fetches else UNFETCHED_S
                if not self._changed.wait(wait_s) and not self._fetches and self._complete:
                    return None
