"""One run on its way through a queue: what it is, what its caller may expect, and what the queue knows of it."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from stepvideo_serve.errors import DeadlineExceeded
from stepvideo_serve.scheduling.progress import Resumable


@dataclass(frozen=True)
class Waiting:
    """A run waits, to begin or to go on: its place (1: next), and the estimated seconds until then, None if unknown."""

    position: int
    start_in_s: float | None


class RunAnswer(Protocol):
    """Where the responses of a run go."""

    def send(self, outputs: dict[str, NDArray[Any]]) -> None: ...
    def waiting(self, waiting: Waiting) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


URGENT, HIGH, NORMAL, LOW = range(4)
"""Priorities. URGENT: a request that has begun waits for the run, so the run is refused only where `max_urgent` of them
wait, and parks any other as often as need be, within their share (queue_rules.py)."""


@dataclass(frozen=True, eq=False)
class RunTerms:
    """What a run is and what its caller may expect; decided when the run is accepted.

    job        what is computed, with its progress; whoever serves the run moves it on
    priority   URGENT, HIGH, NORMAL or LOW
    timeout_s  from the acceptance of the run, None without a deadline
    parkable   whether whoever serves the run can stop it at a step and go on later
    """

    job: Resumable
    priority: int = NORMAL
    timeout_s: float | None = None
    parkable: bool = False


@dataclass
class QueueState:
    """What the queue knows of a run; only the queue writes it. Times are those of time.monotonic().

    arrival        the run's place among all that ever came
    asked_s        when the caller last fetched a response
    parks          how often the run has given way to runs that were not URGENT
    waits_since_s  when the latest wait began
    waited_s       all waits so far
    turns          how often the run has begun
    """

    arrival: int = 0
    asked_s: float = field(default_factory=time.monotonic)
    parks: int = 0
    waits_since_s: float = 0.0
    waited_s: float = 0.0
    turns: int = 0


@dataclass(frozen=True, eq=False)
class QueuedRun:
    """One run on its way.

    request_id, traceparent: of the public request that the run belongs to; "" where unknown.
    cancelled: the run is to end. parked: the run is to give way at its next step.
    """

    run_id: str
    terms: RunTerms
    answer: RunAnswer
    request_id: str = ""
    traceparent: str = ""
    accepted_s: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    parked: threading.Event = field(default_factory=threading.Event)
    state: QueueState = field(default_factory=QueueState)

    @property
    def gives_way(self) -> bool:
        """Whether the run must stop at its next step, but not end."""
        return self.parked.is_set() and not self.cancelled.is_set()

    def remaining_s(self) -> float | None:
        """Seconds left, or None without a deadline. Raises DeadlineExceeded when none are."""
        if self.terms.timeout_s is None:
            return None
        left_s = self.terms.timeout_s - (time.monotonic() - self.accepted_s)
        if left_s <= 0:
            raise waited_too_long()
        return left_s


@dataclass(frozen=True)
class Claim:
    """What decides a run's place in the queue."""

    priority: int
    arrival: int
    accepted_s: float

    @classmethod
    def of(cls, run: QueuedRun) -> "Claim":
        return cls(run.terms.priority, run.state.arrival, run.accepted_s)


def waited_too_long() -> DeadlineExceeded:
    return DeadlineExceeded(
        "The video must be ready within TIMEOUT_S, which ran out while the request waited: "
        "allow more time, or try again later."
    )
