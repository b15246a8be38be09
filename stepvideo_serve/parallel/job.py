"""One job on the group of ranks: what its consumer sees (Run), and how it ends (Job)."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from stepvideo_serve.errors import RequestCancelled, RequestError, WorkerFailed
from stepvideo_serve.parallel.channel import JsonObject
from stepvideo_serve.parallel.shared_memory import Array

ERROR_GRACE_S = 1.0  # from one rank's exception to the end of the others, which may wait for that rank

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepEvent:
    """A report of the leader; the arrays belong to whoever receives the event."""

    params: JsonObject
    tensors: dict[str, Array]


@dataclass(frozen=True)
class ResultEvent:
    """The result, the last event of a run; the arrays belong to whoever receives the event."""

    params: JsonObject
    tensors: dict[str, Array]


Event = StepEvent | ResultEvent


class Job:
    """What the group knows of a job. The group's thread calls it with the messages of the ranks; any thread may cancel.

    cancel_grace_s  the least time that ranks have to obey a cancel; a rank has until the end of its step under way
    tell_ranks      asks all ranks to end the job; called on any thread, and must not fail. Ranks ignore messages about
                    a job that they do not have, so they are asked once the job has `begun`
    """

    def __init__(self, job_id: int, size: int, cancel_grace_s: float, tell_ranks: Callable[[], None]) -> None:
        self.id = job_id
        self.events: queue.SimpleQueue[Event | RequestError] = queue.SimpleQueue()
        """StepEvents, then one ResultEvent or error; without a limit, so that no rank waits for a slow consumer."""
        self.cancelled = False
        self._running = set(range(size))
        self._cancel_grace_s = cancel_grace_s
        self._tell_ranks = tell_ranks
        self._lock = threading.RLock()  # reentrant: a Run may be finalised, and cancel, at any point
        self._stopping = False  # whether the ranks are to end the job
        self._begun = False  # whether the ranks have the job
        self._told = False  # whether the ranks were asked to end the job
        self._cancel_heeded_by_s = float("inf")  # time.monotonic() by which ranks not in a step obey a cancel
        self._follow_by_s = float("inf")  # time.monotonic() by which ranks follow one that raised
        self._result: ResultEvent | None = None
        self._error: RequestError | None = None

    def cancel(self) -> None:
        """Ask the ranks to end the job; does nothing when they have been asked."""
        with self._lock:
            if not self.cancelled:
                self.cancelled = True
                self._cancel_heeded_by_s = time.monotonic() + self._cancel_grace_s
        self._stop()

    def begun(self) -> None:
        """The ranks have the job. A stop that came earlier reaches them now."""
        with self._lock:
            self._begun = True
            self._tell()

    def reported(self, event: StepEvent) -> None:
        """The leader has reported; does nothing after a stop."""
        if not self._stopping:
            self.events.put(event)

    def done(self, rank: int, result: ResultEvent | None) -> None:
        """A rank has ended the job; `result` is the leader's."""
        self._running.discard(rank)
        self._result = self._result or result

    def raised(self, rank: int, error: RequestError) -> None:
        """A rank has ended the job by an exception; the others must follow."""
        self._running.discard(rank)
        self._error = self._error or error
        if self._running:
            self._follow_by_s = min(self._follow_by_s, time.monotonic() + ERROR_GRACE_S)
            self._stop()

    @property
    def ended(self) -> bool:
        """Whether all ranks have ended the job."""
        return not self._running

    def overdue(self, now_s: float, stopping: bool = False) -> str | None:
        """Which ranks have not ended the job in time after a stop, as a clause; None when all is well. `stopping`:
        ranks may still be in the step in which they were told, so that a cancel has more time."""
        if now_s <= self._follow_by_s and (stopping or now_s <= self._cancel_heeded_by_s):
            return None
        who = ", ".join(map(str, sorted(self._running)))
        return f"rank {who} did not stop in time" + (f" after: {self._error}" if self._error else "")

    def outcome(self) -> ResultEvent | RequestError:
        """The last event, once all ranks have ended the job."""
        if self.cancelled:
            return RequestCancelled("The request was cancelled.")
        if self._error is not None:
            return self._error
        return self._result or WorkerFailed("The leader must end with a result, it ended without: see the log.")

    def outcome_of_loss(self, clause: str) -> RequestError:
        """The last event, once the ranks are lost because of `clause`.

        The exception of a rank is a better reason than that other ranks did not follow; but such a failure (a broken
        connection, say) may come from the death of another rank.
        """
        if self.cancelled:
            return RequestCancelled("The request was cancelled.")
        overdue = self.overdue(time.monotonic()) is not None
        if self._error is not None and (overdue or not isinstance(self._error, WorkerFailed)):
            return self._error
        return WorkerFailed(f"The request failed because {clause}: send it again.")

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True
            self._tell()

    def _tell(self) -> None:
        if self._stopping and self._begun and not self._told:
            self._told = True
            self._tell_ranks()


class Run(Iterator[Event]):
    """One job under way: iterate over it to receive the StepEvents and, last, the ResultEvent.

    One thread iterates; any thread may cancel. Dropping the object cancels the job; `close` also waits for its end.

    Iteration raises the RequestError that a rank raised, RequestCancelled after a cancel, WorkerFailed when a rank
    raised something else or was lost (all processes of its generation have ended by then), and ServiceUnavailable when
    the group is closed.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._ended = False

    def __iter__(self) -> "Run":
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        event = self._job.events.get()
        self._ended = not isinstance(event, StepEvent)
        if isinstance(event, RequestError):
            raise event
        return event

    def cancel(self) -> None:
        """Tell the ranks to stop; does nothing when the run has ended."""
        if not self._ended:
            self._job.cancel()

    def close(self) -> None:
        """Cancel the run if it has not ended, and wait for its end: until the step under way has ended, or for
        cancel_grace_s where that is longer."""
        self.cancel()
        try:
            for _ in self:
                continue
        except RequestError as error:
            _logger.info("job %d was given up: %s", self._job.id, error)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.cancel()
