"""Makes the clips of a plan on one server or several, whatever fails on the way."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from stepvideo_client.errors import ClientError, InvalidInput, ServerUnreachable
from stepvideo_client.evaluation.batch_progress import BatchProgress
from stepvideo_client.evaluation.flight import Flight, Job
from stepvideo_client.evaluation.folder import BatchFolder
from stepvideo_client.evaluation.interrupts import Interrupts
from stepvideo_client.evaluation.lane import LONGEST_PAUSE_S, Lane
from stepvideo_client.evaluation.plan import PlannedClip, Settings
from stepvideo_client.evaluation.retries import Verdict, back_off_s, counts, verdict

MOST_FAILURES_IN_A_ROW: Final = 8
_POLL_S: Final = 0.2  # how soon Ctrl-C and the end of a pause are noticed
_GOODBYE_S: Final = 10.0


@dataclass(frozen=True)
class Terms:
    """priority: REQUEST_PRIORITY of every clip. attempts: how often a clip may fail before it is given up. patience_s:
    how long no server at all may be heard of."""

    priority: int
    attempts: int
    patience_s: float


@dataclass
class Runner:
    """Runs once. failed: the clips that were given up, with the sentence why."""

    folder: BatchFolder
    settings: Settings
    lanes: Sequence[Lane]
    terms: Terms
    progress: BatchProgress
    interrupts: Interrupts
    failed: list[tuple[PlannedClip, str]] = field(default_factory=list)
    _todo: deque[Job] = field(default_factory=deque)
    _landed: deque[tuple[Lane, Flight]] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _threads: dict[Flight, threading.Thread] = field(default_factory=dict)
    _in_a_row: int = 0

    def run(self, clips: Iterable[PlannedClip]) -> None:
        """Until all clips are made or given up, or after Ctrl-C those under way. Raises the ClientError or OSError that
        makes going on senseless; whatever happens, nothing is under way afterwards."""
        self._todo.extend(Job(clip) for clip in clips)
        try:
            while self._todo or self._threads:
                if self.interrupts.cancel or (self.interrupts.finish and not self._threads):
                    return
                with self._changed:
                    self._settle()
                    self._send()
                    self.progress.tick(self.lanes)
                    if (self._todo or self._threads) and not self._landed:
                        self._changed.wait(_POLL_S)
        finally:
            self._cancel(self._threads)
            for thread in self._threads.values():
                thread.join(_GOODBYE_S)
            for _, flight in self._landed:  # one may have been too far to be cancelled
                if flight.clip is not None:
                    self.progress.made(flight.clip)
            self.progress.close()

    def _send(self) -> None:
        """As many clips as the servers have room for."""
        if self.interrupts.finish:
            self._cancel(flight for flight in self._threads if not flight.begun)
            self.progress.finishing(sum(not flight.cancelled for flight in self._threads))
            return
        now_s = time.monotonic()
        for lane in self.lanes:
            while lane.has_room(now_s) and (job := self._next_for(lane, now_s)):
                self._start(lane, job)
        self._give_up_waiting(now_s)

    def _next_for(self, lane: Lane, now_s: float) -> Job | None:
        """Takes the next clip out that the lane may try; one that it failed goes elsewhere, where there is another."""
        for job in self._todo:
            if now_s >= job.not_before_s and (job.avoid != lane.url or len(self.lanes) == 1):
                self._todo.remove(job)
                return job
        return None

    def _start(self, lane: Lane, job: Job) -> None:
        flight = lane.take_off(job)

        def fly() -> None:
            flight.fly(self.folder, self.settings, self.terms.priority, self._wake)
            with self._changed:
                self._landed.append((lane, flight))
                self._changed.notify_all()

        thread = threading.Thread(target=fly, name=f"clip {job.clip.name}", daemon=True)
        self._threads[flight] = thread
        thread.start()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _settle(self) -> None:
        """Looks at every flight that has ended."""
        while self._landed:
            lane, flight = self._landed.popleft()
            self._threads.pop(flight)
            if flight.clip is not None:
                lane.land(flight)
                self._in_a_row = 0
                self.progress.made(flight.clip)
            elif flight.error is None:
                lane.land(flight)
                self._todo.appendleft(flight.job)
            elif isinstance(flight.error, ClientError):
                self._fail(lane, flight, flight.error)
            else:
                raise flight.error

    def _fail(self, lane: Lane, flight: Flight, error: ClientError) -> None:
        job, found = flight.job, verdict(error)
        if found is Verdict.NEVER:
            lane.land(flight)
            self._give_up(job, error)
            return
        pause_s = lane.fail(flight, answered=found is not Verdict.AWAY)
        if counts(error, flight.begun):
            job.attempts += 1
            job.avoid = lane.url
            job.not_before_s = time.monotonic() + back_off_s(job.attempts, LONGEST_PAUSE_S)
        if job.attempts >= self.terms.attempts:
            self._give_up(job, error)
            return
        self._todo.appendleft(job)
        self.progress.failed_attempt(job.clip, lane, error, pause_s)

    def _give_up(self, job: Job, error: ClientError) -> None:
        self.failed.append((job.clip, f"{error.code}: {error}"))
        self.progress.gave_up(job.clip, error)
        self._in_a_row += 1
        if self._in_a_row >= MOST_FAILURES_IN_A_ROW:
            raise type(error)(
                f"{self._in_a_row} clips in a row could not be made, the last because: {error} Mend that, and run the "
                "same command again.",
                error.code,
            ) from error

    def _give_up_waiting(self, now_s: float) -> None:
        silent_s = now_s - max(lane.last_heard_s() for lane in self.lanes)
        if all(lane.trouble for lane in self.lanes) and silent_s > self.terms.patience_s:
            raise ServerUnreachable(
                f"No server was heard of for {silent_s:.0f} s (--patience), with {len(self._todo)} clips to make: run "
                "the same command again when one is there."
            )

    def _cancel(self, flights: Iterable[Flight]) -> None:
        for flight in list(flights):
            if not flight.cancelled:
                flight.cancel()


def check_lanes(urls: Sequence[str]) -> None:
    """Raises InvalidInput for a server that is named twice: its queue would be filled twice."""
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise InvalidInput(f"--url must name each server once, got {', '.join(twice)} more than once.")
