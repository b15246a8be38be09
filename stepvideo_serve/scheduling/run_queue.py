"""A bounded queue of runs in front of the ranks, or of a decoder, which do one run at a time.

Order: runs that others depend on (URGENT), then by priority, then by arrival. A run moves up one priority for every
`aging_s` since it was accepted, so that none starves. A new run of a higher priority than the run under way has the
latter parked at its next step: the parked run takes its old place in the queue, and goes on later from that step.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

from stepvideo_serve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestError,
    ServiceUnavailable,
    WorkerFailed,
)
from stepvideo_serve.scheduling.queue_rules import QueueRules, UrgentShare
from stepvideo_serve.scheduling.queued_run import (
    HIGH,
    LOW,
    NORMAL,
    URGENT,
    Claim,
    QueuedRun,
    QueueState,
    RunAnswer,
    RunTerms,
    Waiting,
    waited_too_long,
)

__all__ = [
    "HIGH",
    "LOW",
    "NORMAL",
    "URGENT",
    "Claim",
    "QueueListener",
    "QueueRules",
    "QueueState",
    "QueuedRun",
    "RunAnswer",
    "RunQueue",
    "RunTerms",
    "Waiting",
]


class QueueListener:
    """Told what happens in a queue, while its lock is held: a listener must be quick and must not call the queue.
    This one does nothing."""

    def waiting(self, counts: Mapping[int, int]) -> None:
        """How many runs wait now, by priority; priorities without a run are left out."""

    def began(self, run: QueuedRun, waited_s: float) -> None:
        """A run begins a turn after a wait of `waited_s`; `state.turns` is 1 in its first turn."""

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
    way, told to stop, needs for that; None where that is not known. `listener` is told what happens. An exception that
    escapes `serve` fails all runs, and the queue takes no more.
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
        self._closed: RequestError | None = None  # why new runs are refused; None while they are not
        self._share = UrgentShare(rules.urgent_credit_s)
        self._thread = threading.Thread(target=self._loop, name="runs")
        self._thread.start()

    def put(self, run: QueuedRun) -> None:
        """Adds a run. Raises QueueFull when the most runs wait that may, DeadlineExceeded when the run has no time left
        or too little for the work ahead of it, InvalidRequest when another run has its id, ServiceUnavailable once
        closed.
        """
        run.remaining_s()
        with self._changed:
            if self._closed is not None:
                raise type(self._closed)(str(self._closed))
            if run.run_id in self._waiting or (self._running is not None and self._running.run_id == run.run_id):
                raise InvalidRequest(f"RUN_ID must be new, got {run.run_id[:40]!r} of another run: choose another.")
            self._arrivals += 1
            run.state.arrival = self._arrivals
            self._check_room(run)
            if run.terms.priority != URGENT:
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
        """The run's caller has fetched; returns whether the run waits or is under way."""
        with self._changed:
            found = next((run for run in self._all() if run.run_id == run_id), None)
            if found is not None:
                found.state.asked_s = time.monotonic()
                if found.terms.priority == URGENT:
                    self._make_way(found)  # the share of URGENT runs may have been used up when the run came
            return found is not None

    def end_abandoned(self, lease_s: float) -> None:
        """Ends the runs whose callers have not fetched for `lease_s`."""
        now_s = time.monotonic()
        with self._changed:
            abandoned = [run.run_id for run in self._all() if now_s - run.state.asked_s > lease_s]
        for run_id in abandoned:
            self.cancel(run_id)

    def forecast(self, priority: int) -> tuple[int, float | None]:
        """How many runs wait now, and seconds until a new run of this priority would begin; None if not known."""
        with self._changed:
            newcomer = Claim(priority, self._arrivals + 1, time.monotonic())
            return len(self._waiting), self._wait_s(newcomer)

    def close(self) -> None:
        """Ends all runs and the thread."""
        with self._changed:
            self._closed = self._closed or _shutting_down()
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
        """The runs that wait, the next one first."""
        return sorted(self._waiting.values(), key=lambda run: self._order(Claim.of(run)))

    def _all(self) -> list[QueuedRun]:
        return [*self._waiting.values(), *([] if self._running is None else [self._running])]

    def _check_room(self, run: QueuedRun) -> None:
        urgent = sum(other.terms.priority == URGENT for other in self._waiting.values())
        if run.terms.priority == URGENT:
            if self._rules.max_urgent is not None and urgent >= self._rules.max_urgent:
                raise QueueFull(f"At most {self._rules.max_urgent} urgent runs may wait, {urgent} do: try again later.")
            return
        most, waiting = self._rules.max_waiting, len(self._waiting) - urgent
        busy = self._running is not None or bool(self._waiting)
        if most is None or not busy or waiting < most:
            return
        wait_s = self._wait_s(Claim.of(run))
        expected = "" if wait_s is None else f", which would take about {wait_s:.0f} s"
        raise QueueFull(f"At most {most} requests may wait, {waiting} do{expected}: try again later.")

    def _check_deadline(self, run: QueuedRun) -> None:
        left_s, wait_s, own_s = run.remaining_s(), self._wait_s(Claim.of(run)), self._seconds_of(run)
        if left_s is not None and wait_s is not None and own_s is not None and wait_s + own_s > left_s:
            raise DeadlineExceeded(
                f"The video must be ready within TIMEOUT_S, of which {left_s:.1f} s are left, but about {wait_s:.1f} s "
                f"of waiting and {own_s:.1f} s of denoising are ahead: allow more time, or try again later."
            )

    def _wait_s(self, claim: Claim) -> float | None:
        """Seconds until a run with this claim begins; None where a run ahead of it has no estimate."""
        running = self._running
        ahead = [other for other in self._waiting.values() if self._order(Claim.of(other)) < self._order(claim)]
        seconds = [self._seconds_of(other) for other in ahead]
        if running is not None:
            stops = running.cancelled.is_set() or self._must_give_way(running, claim)
            seconds.append((self._stop_seconds_of if stops else self._seconds_of)(running))
        known = [value for value in seconds if value is not None]
        return sum(known) if len(known) == len(seconds) else None

    def _order(self, claim: Claim) -> tuple[int, int]:
        """The sort key: the lowest is next."""
        if claim.priority == URGENT:
            return URGENT, claim.arrival
        raised = int((time.monotonic() - claim.accepted_s) / self._rules.aging_s)
        return max(claim.priority - raised, HIGH), claim.arrival

    def _must_give_way(self, running: QueuedRun, claim: Claim) -> bool:
        if not running.terms.parkable or claim.priority >= running.terms.priority:
            return False
        may_park = running.state.parks < self._rules.max_parks and self._order(claim) < self._order(Claim.of(running))
        return not self._share.exhausted if claim.priority == URGENT else may_park

    def _make_way(self, run: QueuedRun) -> None:
        """Has the run under way parked, where `run` must go first."""
        running = self._running
        if running is None or running.parked.is_set() or not self._must_give_way(running, Claim.of(run)):
            return
        if run.terms.priority != URGENT:
            running.state.parks += 1
        running.parked.set()
        self._interrupt()

    def _add(self, run: QueuedRun) -> None:
        """Adds a run to those that wait. Here and below the caller holds the lock."""
        self._waiting[run.run_id] = run
        run.state.waits_since_s = time.monotonic()
        if run.terms.timeout_s is not None:
            left_s = max(run.accepted_s + run.terms.timeout_s - time.monotonic(), 0.0)
            self._expiries[run.run_id] = expiry = threading.Timer(left_s, self._expire, (run,))
            expiry.daemon, expiry.name = True, "expiry"
            expiry.start()
        self._tell_positions()

    def _take(self, run_id: str) -> QueuedRun | None:
        """Takes a run out of those that wait; None where it does not wait (any more)."""
        run = self._waiting.pop(run_id, None)
        expiry = self._expiries.pop(run_id, None)
        if expiry is not None:
            expiry.cancel()
        return run

    def _tell_positions(self) -> None:
        """Every run that waits and can be parked hears its place and its estimated start."""
        self._listener.waiting(Counter(run.terms.priority for run in self._waiting.values()))
        if self._running is None:
            return  # the first run in the queue is about to begin
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
        """Sets `cancelled` before the interrupt: `serve` looks at it as soon as the run can be interrupted."""
        if self._running is not None:
            self._running.cancelled.set()
            self._interrupt()

    def _loop(self) -> None:
        try:
            while (run := self._next()) is not None:
                if not self._serve(run):
                    self._park(run)
        except BaseException as error:
            self._fail_all(type(error).__name__)
            raise  # ThreadDeaths hears of the exception

    def _fail_all(self, reason: str) -> None:
        """Fails every run: the thread that serves them has died."""
        with self._changed:
            self._closed = WorkerFailed(f"The queue of runs has failed ({reason}): load the model anew.")
            left = self._all()
            self._running = None
            for run in left:
                self._take(run.run_id)
        for run in left:
            run.answer.fail(self._closed)

    def _next(self) -> QueuedRun | None:
        """Waits for a run and makes it the one under way; None once closed."""
        with self._changed:
            self._running = None
            self._share.end()
            while not self._waiting and self._closed is None:
                self._changed.wait()
            if self._closed is not None:
                return None
            run = self._first()
            self._take(run.run_id)
            others_wait = any(other.terms.priority != URGENT for other in self._waiting.values())
            self._share.begin(run.terms.priority == URGENT, others_wait)
            run.parked.clear()
            self._running = run
            waited_s = time.monotonic() - run.state.waits_since_s
            run.state.waited_s += waited_s
            run.state.turns += 1
            self._listener.began(run, waited_s)
            self._tell_positions()
            return run

    def _first(self) -> QueuedRun:
        """The run whose turn is next; no URGENT one, while those have had more than their share and others wait."""
        runs = self._in_order()
        others = [run for run in runs if run.terms.priority != URGENT]
        return others[0] if others and self._share.exhausted else runs[0]

    def _park(self, run: QueuedRun) -> None:
        """Puts the run back into the queue, unless it was cancelled or the queue closed meanwhile."""
        with self._changed:
            ended = self._closed or (_cancelled() if run.cancelled.is_set() else None)
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
