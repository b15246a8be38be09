"""A bounded queue of denoising runs, first in first out, in front of ranks that take one at a time."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from stepvideo_serve.errors import DeadlineExceeded, QueueFull, RequestCancelled, ServiceUnavailable


class Answer(Protocol):
    """Where the responses of a run go."""

    def send(self, outputs: dict[str, NDArray[Any]]) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


@dataclass
class QueuedRun:
    """One run; `params["timeout_s"]` counts from `accepted_s`."""

    run_id: str
    params: dict[str, Any]
    tensors: dict[str, NDArray[Any]]
    answer: Answer
    accepted_s: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def remaining_s(self) -> float | None:
        """Seconds left, or None without a deadline. Raises DeadlineExceeded when none are."""
        timeout_s = self.params["timeout_s"]
        if timeout_s is None:
            return None
        left_s = float(timeout_s) - (time.monotonic() - self.accepted_s)
        if left_s <= 0:
            raise DeadlineExceeded("The video must be ready within TIMEOUT_S, which ran out while the request waited.")
        return left_s


class RunQueue:
    """Runs `serve(run)` for one run after another on a thread of its own.

    `serve` answers the run, errors included; `interrupt` ends the one under way, if it has begun: `serve` therefore
    looks at `run.cancelled` once it has.
    """

    def __init__(self, max_waiting: int, serve: Callable[[QueuedRun], None], interrupt: Callable[[], None]) -> None:
        self._max_waiting = max_waiting
        self._serve, self._interrupt = serve, interrupt
        self._waiting: OrderedDict[str, QueuedRun] = OrderedDict()
        self._running: QueuedRun | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="denoiser")
        self._thread.start()

    def put(self, run: QueuedRun) -> None:
        """Raises QueueFull at once when as many runs wait as may."""
        with self._changed:
            if self._closed:
                raise ServiceUnavailable("The server is shutting down: send the request to another one.")
            busy = self._running is not None or bool(self._waiting)
            if busy and len(self._waiting) >= self._max_waiting:
                raise QueueFull(
                    f"At most {self._max_waiting} requests may wait, {len(self._waiting)} do: try again later."
                )
            self._waiting[run.run_id] = run
            self._changed.notify_all()

    def cancel(self, run_id: str) -> None:
        """Ends the run, waiting or under way; does nothing when it has ended."""
        with self._changed:
            waiting = self._waiting.pop(run_id, None)
            if waiting is None and self._running is not None and self._running.run_id == run_id:
                self._end_running()
        if waiting is not None:
            waiting.answer.fail(RequestCancelled("The request was cancelled by its caller."))

    def close(self) -> None:
        """Ends all runs and the thread."""
        with self._changed:
            self._closed = True
            left = list(self._waiting.values())
            self._waiting.clear()
            self._end_running()
            self._changed.notify_all()
        for run in left:
            run.answer.fail(ServiceUnavailable("The server is shutting down: send the request to another one."))
        self._thread.join()

    def _end_running(self) -> None:
        """The mark comes first: whoever starts the run looks at it once the run can be interrupted."""
        if self._running is not None:
            self._running.cancelled.set()
            self._interrupt()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                _, self._running = self._waiting.popitem(last=False)
                run = self._running
            self._serve(run)
