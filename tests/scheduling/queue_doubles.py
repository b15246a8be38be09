"""Stand-ins around a queue of runs: what answers go to, what serves runs, and runs."""

import queue
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import RequestCancelled
from stepvideo_serve.scheduling.progress import Repeated
from stepvideo_serve.scheduling.run_queue import QueuedRun, QueueRules, RunQueue, RunTerms, Waiting

PATIENCE_S = 60.0


class Mailbox:
    """Keeps the one answer of a run."""

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[BaseException | str] = queue.SimpleQueue()

        self.places: queue.SimpleQueue[Waiting] = queue.SimpleQueue()

    def send(self, outputs: dict[str, NDArray[Any]]) -> None:
        self._answers.put(outputs["DONE"].item())

    def waiting(self, waiting: Waiting) -> None:
        self.places.put(waiting)

    def fail(self, error: BaseException) -> None:
        self._answers.put(error)

    def close(self) -> None:
        raise AssertionError("an answer is sent once")

    def answer(self) -> BaseException | str:
        return self._answers.get(timeout=PATIENCE_S)

    def place(self) -> tuple[int, float | None]:
        """The next place in the queue that the run was told, and when it may begin."""
        told = self.places.get(timeout=PATIENCE_S)
        return told.position, told.start_in_s

    @property
    def empty(self) -> bool:
        return self._answers.empty()


class Ranks:
    """Serves runs one at a time, each until it is let go or interrupted."""

    def __init__(self) -> None:
        self.started: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.turn = threading.Semaphore(0)
        self.current: QueuedRun | None = None

    def serve(self, run: QueuedRun) -> bool:
        self.current = run
        self.started.put(run.run_id)
        self.turn.acquire()
        if run.gives_way:
            return False
        if run.cancelled.is_set():
            run.answer.fail(RequestCancelled("cancelled"))
        else:
            run.answer.send({"DONE": np.array(run.run_id)})
        return True

    def seconds_of(self, run: QueuedRun) -> float | None:
        """As the test says."""
        assert isinstance(run.terms.job, TimedJob)
        return run.terms.job.seconds

    def interrupt(self) -> None:
        assert self.current is not None
        assert self.current.cancelled.is_set() or self.current.parked.is_set(), "the mark comes first"
        self.turn.release()

    def next_started(self) -> str:
        return self.started.get(timeout=PATIENCE_S)


class TimedJob(Repeated):
    """A job of which the test says how long it will take."""

    def __init__(self, seconds: float | None) -> None:
        super().__init__("denoise", {})
        self.seconds = seconds


def new_run(run_id: str, seconds: float | None = None, **terms: Any) -> tuple[QueuedRun, Mailbox]:
    mailbox = Mailbox()
    return QueuedRun(run_id, RunTerms(TimedJob(seconds), **terms), mailbox), mailbox


def new_queue(ranks: Ranks, max_waiting: int | None, max_parks: int = 0, aging_s: float = 600.0) -> RunQueue:
    return RunQueue(QueueRules(max_waiting, max_parks, aging_s), ranks.serve, ranks.interrupt, ranks.seconds_of)
