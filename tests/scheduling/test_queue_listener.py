"""What a queue tells its listener."""

import queue
import threading
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from stepvideo_serve.scheduling.progress import Repeated
from stepvideo_serve.scheduling.run_queue import (
    LOW,
    NORMAL,
    QueuedRun,
    QueueListener,
    QueueRules,
    RunQueue,
    RunTerms,
    Waiting,
)

PATIENCE_S = 60.0


class Diary(QueueListener):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, ...]] = []
        self.counts: dict[int, int] = {}

    def waiting(self, counts: Mapping[int, int]) -> None:
        self.counts = dict(counts)

    def began(self, run: QueuedRun, waited_s: float) -> None:
        assert run.state.waited_s >= waited_s >= 0
        self.heard.append(("began", run.run_id, str(run.state.turns)))

    def parked(self, run: QueuedRun) -> None:
        self.heard.append(("parked", run.run_id))

    def left(self, run: QueuedRun) -> None:
        self.heard.append(("left", run.run_id))


class Silent:
    """An answer that nobody reads."""

    def send(self, outputs: dict[str, NDArray[Any]]) -> None:
        """Does nothing."""

    def waiting(self, waiting: Waiting) -> None:
        """Does nothing."""

    def fail(self, error: BaseException) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def test_waits_turns_parks_and_who_left() -> None:
    started: queue.SimpleQueue[str] = queue.SimpleQueue()
    turn = threading.Semaphore(0)

    def serve(run: QueuedRun) -> bool:
        started.put(run.run_id)
        turn.acquire()
        return not run.gives_way

    def run(name: str, priority: int) -> QueuedRun:
        return QueuedRun(name, RunTerms(Repeated("denoise", {}), priority, parkable=True), Silent())

    diary = Diary()
    runs = RunQueue(QueueRules(8, max_parks=1), serve, turn.release, lambda _: None, diary)
    runs.put(run("low", LOW))
    assert started.get(timeout=PATIENCE_S) == "low"
    assert diary.counts == {}
    runs.put(run("normal", NORMAL))  # parks the first one
    assert started.get(timeout=PATIENCE_S) == "normal"
    assert diary.counts == {LOW: 1}
    runs.put(run("gone", LOW))
    assert diary.counts == {LOW: 2}
    runs.cancel("gone")
    assert diary.counts == {LOW: 1}
    turn.release()
    assert started.get(timeout=PATIENCE_S) == "low"
    runs.put(run("last", LOW))
    runs.close()
    assert diary.heard == [
        ("began", "low", "1"),
        ("parked", "low"),
        ("began", "normal", "1"),
        ("left", "gone"),
        ("began", "low", "2"),
        ("left", "last"),
    ]
