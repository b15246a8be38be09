"""URGENT runs go first, but not for ever; and a queue whose thread dies says so to everybody."""

import threading
import time

import numpy as np
import pytest

from stepvideo_serve.errors import QueueFull, WorkerFailed
from stepvideo_serve.scheduling.run_queue import URGENT, QueuedRun, QueueRules, RunQueue
from tests.scheduling.queue_doubles import PATIENCE_S, new_run


def queue_of(rules: QueueRules, turns: list[str], took_s: float) -> RunQueue:
    """Every run takes so long; its end is the next entry of `turns`. A run that is told to give way does."""

    def serve(run: QueuedRun) -> bool:
        run.parked.wait(took_s)
        if run.gives_way:
            return False
        turns.append(run.run_id)
        run.answer.send({"DONE": np.array(run.run_id)})
        return True

    return RunQueue(rules, serve, lambda: None, lambda _: None)


def until(condition: "threading.Event", what: str) -> None:
    assert condition.wait(PATIENCE_S), what


def test_a_flood_of_urgent_runs_does_not_starve_the_others() -> None:
    turns: list[str] = []
    runs = queue_of(QueueRules(8, urgent_credit_s=0.2), turns, 0.05)
    over = threading.Event()

    def flood() -> None:
        number = 0
        while not over.is_set():
            runs.put(new_run(f"urgent {number}", priority=URGENT)[0])
            number += 1
            time.sleep(0.005)  # ten times as many as there is time for

    attacker = threading.Thread(target=flood)
    attacker.start()
    try:
        while len(turns) < 2:
            time.sleep(0.01)
        for name in ("first", "second"):
            runs.put(new_run(name, parkable=True)[0])
        deadline_s = time.monotonic() + PATIENCE_S
        while not {"first", "second"} <= set(turns):
            assert time.monotonic() < deadline_s, turns
            time.sleep(0.01)
    finally:
        over.set()
        attacker.join()
        runs.close()


def test_within_its_share_an_urgent_run_goes_first() -> None:
    turns: list[str] = []
    runs = queue_of(QueueRules(8), turns, 0.2)
    runs.put(new_run("first", parkable=True)[0])
    runs.put(new_run("second", parkable=True)[0])
    runs.put(new_run("urgent", priority=URGENT)[0])
    deadline_s = time.monotonic() + PATIENCE_S
    while len(turns) < 3:
        assert time.monotonic() < deadline_s, turns
        time.sleep(0.01)
    runs.close()
    assert turns[0] == "urgent"


def test_urgent_runs_are_bounded_too() -> None:
    release = threading.Event()
    runs = RunQueue(QueueRules(8, max_urgent=2), lambda _: release.wait(PATIENCE_S), lambda: None, lambda _: None)
    try:
        for name in ("under way", "a", "b"):
            runs.put(new_run(name, priority=URGENT)[0])
            deadline_s = time.monotonic() + PATIENCE_S
            while name == "under way" and runs.forecast(URGENT)[0] and time.monotonic() < deadline_s:
                time.sleep(0.01)
        with pytest.raises(QueueFull, match="At most 2 urgent runs may wait, 2 do"):
            runs.put(new_run("c", priority=URGENT)[0])
    finally:
        release.set()
        runs.close()


def test_a_queue_whose_thread_dies_fails_all_runs_and_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    died, release = threading.Event(), threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: died.set())

    def serve(run: QueuedRun) -> bool:
        release.wait(PATIENCE_S)
        raise OverflowError(f"planted in {run.run_id}")

    runs = RunQueue(QueueRules(8), serve, lambda: None, lambda _: None)
    under_way, first = new_run("under way")
    waiting, second = new_run("waiting")
    runs.put(under_way)
    runs.put(waiting)
    release.set()
    until(died, "the death to be heard of")
    for mailbox in (first, second):
        answer = mailbox.answer()
        assert isinstance(answer, WorkerFailed)
        assert str(answer) == "The queue of runs has failed (OverflowError): load the model anew."
    with pytest.raises(WorkerFailed, match="The queue of runs has failed"):
        runs.put(new_run("late")[0])
    runs.close()
