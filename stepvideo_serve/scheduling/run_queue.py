"""A bounded queue of runs in front of something that does one at a time.

Order: runs that others depend on (URGENT), then by priority, then by arrival. A run that waits moves up one priority
every `aging_s`, so that none starves. A run that comes in with a higher priority than the one under way has that one
parked at its next step; it takes its old place in the queue and goes on later where it was.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from stepvideo_serve.errors import DeadlineExceeded, InvalidRequest, QueueFull, RequestCancelled, ServiceUnavailable
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
"""Priorities. URGENT: a request that has begun waits for the run, so the run is never refused for lack of room, and
parks any other as often as need be."""


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
    asked_s        when the caller last showed that it is there
    parks          how often the run has given way to runs that were not URGENT
    waits_since_s  when the wait began that is under way or was the last
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


@dataclass(frozen=True)
class QueueRules:
    """max_waiting: how many may wait behind the one under way, None: any number. max_parks: how often one run may be
    parked. aging_s: seconds of waiting that raise a run by one priority."""

    max_waiting: int | None
    max_parks: int = 0
    aging_s: float = 600.0


class QueueListener:
    """Told what happens in a queue, while its lock is held: to be quick, and not to call the queue. Does nothing."""

    def waiting(self, counts: Mapping[int, int]) -> None:
        """How many wait now, by priority; priorities without any are left out."""

    def began(self, run: QueuedRun, waited_s: float) -> None:
        """A run has its turn, its first where `state.turns` is 1, after a wait of `waited_s`."""

    def parked(self, run: QueuedRun) -> None:
        """A run has given way and waits again."""

    def left(self, run: QueuedRun) -> None:
        """A run that waited was taken out: cancelled, or too late, or the queue was closed."""


class RunQueue:
    """Runs `serve(run)` for one run after another on a thread of its own.

    `serve` answers the run, errors included, and returns True; or, because of `run.gives_way`, it stops at a step and
    returns False. A run whose time is over while it waits is answered then. To end or park the one under way, its
    `cancelled` or `parked` is set and then `interrupt` called, which may find that it has not begun: `serve` looks at
    both once it has. `seconds_of(run)`: how long a run will still take; `stop_seconds_of(run)`: how long the one under
    way, told to stop, needs for that; None where that is not known. `listener` is told what happens.
    """

    def __init__(
        self,
        rules: QueueRules,
        serve: Callable[[QueuedRun], bool],
        interrupt: Callable[[], None],
        seconds_of: Callable[[QueuedRun], float | None],
        listener: QueueListener | None = None,
        stop_seconds_of: Callable[[QueuedRun], float | None] = lambda _: 0.0,
    ) -> None:
        self._listener = listener or QueueListener()
        self._rules, self._serve, self._interrupt = rules, serve, interrupt
        self._seconds_of, self._stop_seconds_of = seconds_of, stop_seconds_of
        self._waiting: dict[str, QueuedRun] = {}
        self._expiries: dict[str, threading.Timer] = {}
        self._running: QueuedRun | None = None
        self._arrivals = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="runs")
        self._thread.start()

    def put(self, run: QueuedRun) -> None:
        """Raises, at once, QueueFull when as many runs wait as may, DeadlineExceeded when the run has no time left or
        too little for what is ahead of it, InvalidRequest when another run has its id, ServiceUnavailable once closed.
        """
        run.remaining_s()
        with self._changed:
            if self._closed:
                raise _shutting_down()
            if run.run_id in self._waiting or (self._running is not None and self._running.run_id == run.run_id):
                raise InvalidRequest(f"RUN_ID must be new, got {run.run_id[:40]!r} of another run: choose another.")
            self._arrivals += 1
            run.state.arrival = self._arrivals
            if run.terms.priority != URGENT:
                self._check_room(run)
                self._check_deadline(run)
            self._add(run)
            self._make_way(run)
            self._changed.notify_all()

    def cancel(self, run_id: str) -> None:
        """Ends the run, waiting or under way; does nothing when it has ended."""
        with self._changed:
            waiting = self._take(run_id)
            if waiting is None and self._running is not None and self._running.run_id == run_id:
                self._end_running()
            if waiting is not None:
                self._listener.left(waiting)
            self._tell_positions()
        if waiting is not None:
            waiting.answer.fail(_cancelled())

    def renew(self, run_id: str) -> bool:
        """The run's caller is there; whether the run waits or is under way."""
        with self._changed:
            found = next((run for run in self._all() if run.run_id == run_id), None)
            if found is not None:
                found.state.asked_s = time.monotonic()
            return found is not None

    def end_abandoned(self, lease_s: float) -> None:
        """Ends the runs whose callers have not shown themselves for so long."""
        now_s = time.monotonic()
        with self._changed:
            abandoned = [run.run_id for run in self._all() if now_s - run.state.asked_s > lease_s]
        for run_id in abandoned:
            self.cancel(run_id)

    def forecast(self, priority: int) -> tuple[int, float | None]:
        """How many runs wait now, and in how many seconds a run of this priority would begin, None if not known."""
        with self._changed:
            newcomer = Claim(priority, self._arrivals + 1, time.monotonic())
            return len(self._waiting), self._wait_s(newcomer)

    def close(self) -> None:
        """Ends all runs and the thread."""
        with self._changed:
            self._closed = True
            left = [self._take(run_id) for run_id in list(self._waiting)]
            for run in left:
                if run is not None:
                    self._listener.left(run)
            self._end_running()
            self._changed.notify_all()
        for run in left:
            if run is not None:
                run.answer.fail(_shutting_down())
        self._thread.join()

    def _in_order(self) -> list[QueuedRun]:
        """Those that wait, the next one first."""
        return sorted(self._waiting.values(), key=lambda run: self._order(Claim.of(run)))

    def _all(self) -> list[QueuedRun]:
        return [*self._waiting.values(), *([] if self._running is None else [self._running])]

    def _check_room(self, run: QueuedRun) -> None:
        most = self._rules.max_waiting
        busy = self._running is not None or bool(self._waiting)
        if most is None or not busy or len(self._waiting) < most:
            return
        wait_s = self._wait_s(Claim.of(run))
        expected = "" if wait_s is None else f", which would take about {wait_s:.0f} s"
        raise QueueFull(f"At most {most} requests may wait, {len(self._waiting)} do{expected}: try again later.")

    def _check_deadline(self, run: QueuedRun) -> None:
        left_s, wait_s, own_s = run.remaining_s(), self._wait_s(Claim.of(run)), self._seconds_of(run)
        if left_s is not None and wait_s is not None and own_s is not None and wait_s + own_s > left_s:
            raise DeadlineExceeded(
                f"The video must be ready within TIMEOUT_S, of which {left_s:.1f} s are left, but about {wait_s:.1f} s "
                f"of waiting and {own_s:.1f} s of denoising are ahead: allow more time, or try again later."
            )

    def _wait_s(self, claim: Claim) -> float | None:
        """Until a run with this claim begins, as far as is known now."""
        running = self._running
        ahead = [other for other in self._waiting.values() if self._order(Claim.of(other)) < self._order(claim)]
        seconds = [self._seconds_of(other) for other in ahead]
        if running is not None:
            stops = running.cancelled.is_set() or self._must_give_way(running, claim)
            seconds.append((self._stop_seconds_of if stops else self._seconds_of)(running))
        known = [value for value in seconds if value is not None]
        return sum(known) if len(known) == len(seconds) else None

    def _order(self, claim: Claim) -> tuple[int, int]:
        """Sorts by who is next."""
        if claim.priority == URGENT:
            return URGENT, claim.arrival
        raised = int((time.monotonic() - claim.accepted_s) / self._rules.aging_s)
        return max(claim.priority - raised, HIGH), claim.arrival

    def _must_give_way(self, running: QueuedRun, claim: Claim) -> bool:
        if not running.terms.parkable or claim.priority >= running.terms.priority:
            return False
        may_park = running.state.parks < self._rules.max_parks and self._order(claim) < self._order(Claim.of(running))
        return claim.priority == URGENT or may_park

    def _make_way(self, run: QueuedRun) -> None:
        """Has the run under way parked, if this one must go first."""
        running = self._running
        if running is None or running.parked.is_set() or not self._must_give_way(running, Claim.of(run)):
            return
        if run.terms.priority != URGENT:
            running.state.parks += 1
        running.parked.set()
        self._interrupt()

    def _add(self, run: QueuedRun) -> None:
        """Among those that wait; the caller holds the lock, and so on below."""
        self._waiting[run.run_id] = run
        run.state.waits_since_s = time.monotonic()
        if run.terms.timeout_s is not None:
            left_s = max(run.accepted_s + run.terms.timeout_s - time.monotonic(), 0.0)
            self._expiries[run.run_id] = expiry = threading.Timer(left_s, self._expire, (run,))
            expiry.daemon = True
            expiry.start()
        self._tell_positions()

    def _take(self, run_id: str) -> QueuedRun | None:
        """Takes a run out of the queue; None when it is not there (any more)."""
        run = self._waiting.pop(run_id, None)
        expiry = self._expiries.pop(run_id, None)
        if expiry is not None:
            expiry.cancel()
        return run

    def _tell_positions(self) -> None:
        """Every run that waits and can be parked hears its place and its estimated start."""
        self._listener.waiting(Counter(run.terms.priority for run in self._waiting.values()))
        if self._running is None:
            return  # the first of them is about to begin
        for place, run in enumerate(self._in_order(), start=1):
            if run.terms.parkable:
                run.answer.waiting(Waiting(place, self._wait_s(Claim.of(run))))

    def _expire(self, run: QueuedRun) -> None:
        """Called when the run's time is over. Another run may have its id by now."""
        with self._changed:
            if self._waiting.get(run.run_id) is not run:
                return
            self._take(run.run_id)
            self._listener.left(run)
            self._tell_positions()
        run.answer.fail(waited_too_long())

    def _end_running(self) -> None:
        """The mark comes first: whoever starts the run looks at it once the run can be interrupted."""
        if self._running is not None:
            self._running.cancelled.set()
            self._interrupt()

    def _loop(self) -> None:
        while (run := self._next()) is not None:
            if not self._serve(run):
                self._park(run)

    def _next(self) -> QueuedRun | None:
        """Waits for a run and makes it the one under way; None once closed."""
        with self._changed:
            self._running = None
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            run = self._in_order()[0]
            self._take(run.run_id)
            run.parked.clear()
            self._running = run
            waited_s = time.monotonic() - run.state.waits_since_s
            run.state.waited_s += waited_s
            run.state.turns += 1
            self._listener.began(run, waited_s)
            self._tell_positions()
            return run

    def _park(self, run: QueuedRun) -> None:
        """Back into the queue, unless it was ended meanwhile."""
        with self._changed:
            ended = _shutting_down() if self._closed else _cancelled() if run.cancelled.is_set() else None
            self._running = None
            if ended is None:
                self._listener.parked(run)
                self._add(run)
        if ended is not None:
            run.answer.fail(ended)


def _shutting_down() -> ServiceUnavailable:
    return ServiceUnavailable("The server is shutting down: send the request to another one.")


def _cancelled() -> RequestCancelled:
    return RequestCancelled("The request was cancelled by its caller.")
