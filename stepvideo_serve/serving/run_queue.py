"""A bounded queue of runs, first in first out, in front of something that does one at a time."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from stepvideo_serve.errors import DeadlineExceeded, InvalidRequest, QueueFull, RequestCancelled, ServiceUnavailable


class Answer(Protocol):
    """Where the responses of a run go."""

    def send(self, outputs: dict[str, NDArray[Any]]) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


@dataclass
class QueuedRun:
    """One run. params["timeout_s"], absent or None without a deadline, counts from `accepted_s`; with params["urgent"]
    it goes before all that wait."""

    run_id: str
    params: dict[str, Any]
    tensors: dict[str, NDArray[Any]]
    answer: Answer
    accepted_s: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def remaining_s(self) -> float | None:
        """Seconds left, or None without a deadline. Raises DeadlineExceeded when none are."""
        timeout_s = self.params.get("timeout_s")
        if timeout_s is None:
            return None
        left_s = float(timeout_s) - (time.monotonic() - self.accepted_s)
        if left_s <= 0:
            raise waited_too_long()
        return left_s


def waited_too_long() -> DeadlineExceeded:
    return DeadlineExceeded(
        "The video must be ready within TIMEOUT_S, which ran out while the request waited: "
        "allow more time, or try again later."
    )


class RunQueue:
    """Runs `serve(run)` for one run after another on a thread of its own.

    `serve` answers the run, errors included. A run whose time is over while it waits is answered then. To end the one
    under way, `run.cancelled` is set and then `interrupt` called, which may find that it has not begun: `serve` looks
    at `run.cancelled` once it has. `max_waiting` is how many may wait behind the one under way; None: any number.
    """

    def __init__(
        self, max_waiting: int | None, serve: Callable[[QueuedRun], None], interrupt: Callable[[], None]
    ) -> None:
        self._max_waiting = max_waiting
        self._serve, self._interrupt = serve, interrupt
        self._waiting: OrderedDict[str, QueuedRun] = OrderedDict()
        self._expiries: dict[str, threading.Timer] = {}
        self._running: QueuedRun | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="runs")
        self._thread.start()

    def put(self, run: QueuedRun) -> None:
        """Raises, at once, QueueFull when as many runs wait as may, DeadlineExceeded when the run has no time left,
        InvalidRequest when another run has its id, ServiceUnavailable once closed."""
        left_s = run.remaining_s()
        with self._changed:
            if self._closed:
                raise ServiceUnavailable("The server is shutting down: send the request to another one.")
            if run.run_id in self._waiting or (self._running is not None and self._running.run_id == run.run_id):
                raise InvalidRequest(f"RUN_ID must be new, got {run.run_id[:40]!r} of another run: choose another.")
            urgent = bool(run.params.get("urgent"))
            busy = self._running is not None or bool(self._waiting)
            if self._max_waiting is not None and busy and not urgent and len(self._waiting) >= self._max_waiting:
                raise QueueFull(
                    f"At most {self._max_waiting} requests may wait, {len(self._waiting)} do: try again later."
                )
            self._waiting[run.run_id] = run
            if urgent:
                self._waiting.move_to_end(run.run_id, last=False)
            if left_s is not None:
                self._expiries[run.run_id] = expiry = threading.Timer(left_s, self._expire, (run,))
                expiry.daemon = True
                expiry.start()
            self._changed.notify_all()

    def cancel(self, run_id: str) -> None:
        """Ends the run, waiting or under way; does nothing when it has ended."""
        with self._changed:
            waiting = self._take(run_id)
            if waiting is None and self._running is not None and self._running.run_id == run_id:
                self._end_running()
        if waiting is not None:
            waiting.answer.fail(RequestCancelled("The request was cancelled by its caller."))

    def close(self) -> None:
        """Ends all runs and the thread."""
        with self._changed:
            self._closed = True
            left = [self._take(run_id) for run_id in list(self._waiting)]
            self._end_running()
            self._changed.notify_all()
        for run in left:
            if run is not None:
                run.answer.fail(ServiceUnavailable("The server is shutting down: send the request to another one."))
        self._thread.join()

    def _take(self, run_id: str) -> QueuedRun | None:
        """Takes a run out of the queue; None when it is not there (any more)."""
        run = self._waiting.pop(run_id, None)
        expiry = self._expiries.pop(run_id, None)
        if expiry is not None:
            expiry.cancel()
        return run

    def _expire(self, run: QueuedRun) -> None:
        """Called when the run's time is over. Another run may have its id by now."""
        with self._changed:
            if self._waiting.get(run.run_id) is not run:
                return
            self._take(run.run_id)
        run.answer.fail(waited_too_long())

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
                self._running = run = self._take(next(iter(self._waiting)))
            if run is not None:
                self._serve(run)
