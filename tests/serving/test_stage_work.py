"""One task after the other on a thread of its own: cancelled, lost in an error, or stuck, while others may ask."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from stepvideo_serve.errors import RequestCancelled, WorkerFailed
from stepvideo_serve.launch.health import LOST_THREAD
from stepvideo_serve.serving.stage_work import Arrays, StageWork, Task

SOON_S = 10.0
ONE: Arrays = {"x": np.ones(1)}


class Letter:
    """Keeps the one response."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def finish(self, outputs: Arrays) -> None:
        self._inbox.put(outputs)

    def fail(self, error: BaseException) -> None:
        self._inbox.put(error)

    def get(self) -> Any:
        return self._inbox.get(timeout=SOON_S)


def ask(work: StageWork, call_id: str = "") -> Letter:
    letter = Letter()
    work.put(Task(ONE, letter, call_id))
    return letter


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_tasks_are_answered_in_turn_and_errors_are_answers() -> None:
    seen: list[int] = []

    def answer(inputs: Arrays) -> Arrays:
        seen.append(len(seen))
        if len(seen) == 2:
            raise ValueError("the second one")
        return {"y": inputs["x"] + seen[-1]}

    work = StageWork(answer)
    first, second, third = (ask(work) for _ in range(3))
    assert first.get()["y"] == 1
    assert str(second.get()) == "the second one"
    assert third.get()["y"] == 3


def test_a_cancel_reaches_the_task_under_way_and_those_that_wait() -> None:
    began = threading.Event()
    answered: list[str] = []

    def answer(_: Arrays) -> Arrays:
        began.set()
        answered.append("one")
        wait_for(work.cancelled)
        raise RequestCancelled("Nobody wants it.")

    work = StageWork(answer)
    first, second = ask(work, "a"), ask(work, "b")
    assert began.wait(SOON_S)
    work.cancel("unknown")
    work.cancel("b")
    assert isinstance(second.get(), RequestCancelled), "it waits for nothing"
    assert not work.cancelled()
    work.cancel("a")
    assert str(first.get()) == "Nobody wants it."
    assert answered == ["one"], "the second one was not begun"


def test_a_model_that_is_stuck_says_so_but_not_while_another_process_works() -> None:
    here, back, go_on = threading.Event(), threading.Event(), threading.Event()

    def answer(inputs: Arrays) -> Arrays:
        with work.elsewhere():
            here.set()
            back.wait(SOON_S)
        go_on.wait(SOON_S)
        return inputs

    work = StageWork(answer, stuck_s=0.05)
    work.check("text_encoder")
    letter = ask(work)
    assert here.wait(SOON_S)
    time.sleep(0.1)
    work.check("text_encoder")
    back.set()

    def stuck() -> bool:
        try:
            work.check("text_encoder")
        except WorkerFailed as failed:
            return f"text_encoder {LOST_THREAD}, stuck in a request for" in str(failed)
        return False

    wait_for(stuck)
    go_on.set()
    assert letter.get() == ONE
    wait_for(lambda: not stuck())
