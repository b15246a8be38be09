"""Responses that wait for whoever fetches them."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from stepvideo_serve.errors import WorkerFailed
from stepvideo_serve.scheduling.run_queue import Waiting
from stepvideo_serve.serving import mailbox as module
from stepvideo_serve.serving.mailbox import HOLD_S, Backlog, Letter, Mailbox

PATIENCE_S = 30.0
Got = dict[str, Any] | BaseException


class Fetch:
    """A reply that can be waited for."""

    def __init__(self) -> None:
        self.got: queue.SimpleQueue[Got] = queue.SimpleQueue()

    def finish(self, outputs: dict[str, Any]) -> None:
        self.got.put(outputs)

    def waiting(self, waiting: Waiting) -> None:
        self.got.put({"WAITING": np.array([waiting.position])})

    def fail(self, error: BaseException) -> None:
        self.got.put(error)


class Stuck(Fetch):
    """One whose caller has died: it never returns."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def finish(self, outputs: dict[str, Any]) -> None:  # noqa: ARG002  # the protocol's
        self.over.wait(PATIENCE_S)


@pytest.fixture
def gone() -> threading.Event:
    return threading.Event()


@pytest.fixture
def box(gone: threading.Event) -> Iterator[Mailbox]:
    box = Mailbox(gone.set, Backlog(1 << 20))
    box.start()
    yield box
    box.close()


@pytest.fixture
def fetch(box: Mailbox) -> Callable[[], Got]:
    def once() -> Got:
        reply = Fetch()
        box.fetch(reply)
        return reply.got.get(timeout=PATIENCE_S)

    return once


def names(got: Got) -> list[str]:
    assert isinstance(got, dict)
    return list(got)


def number(value: int) -> dict[str, Any]:
    return {"N": np.array([value])}


def test_outputs_come_in_order_and_then_the_end(box: Mailbox, fetch: Callable[[], Got], gone: threading.Event) -> None:
    for value in range(3):
        box.send(number(value))
    box.close()
    box.send(number(9))
    got = [fetch() for _ in range(4)]
    assert [names(one) for one in got] == [["N"], ["N"], ["N"], ["ENDED"]]
    assert [one["N"][0] for one in got[:3] if isinstance(one, dict)] == [0, 1, 2]
    assert gone.wait(PATIENCE_S)


def test_a_wait_is_one_of_the_answers(box: Mailbox, fetch: Callable[[], Got]) -> None:
    box.waiting(Waiting(3, None))
    box.send(number(1))
    assert [names(fetch()) for _ in range(2)] == [["WAITING"], ["N"]]


def test_an_error_is_the_last(box: Mailbox, fetch: Callable[[], Got], gone: threading.Event) -> None:
    box.send(number(1))
    box.fail(ValueError("no"))
    box.close()
    assert names(fetch()) == ["N"]
    assert isinstance(fetch(), ValueError)
    assert gone.wait(PATIENCE_S)


def test_a_fetch_without_anything_is_answered_with_nothing_in_time(fetch: Callable[[], Got]) -> None:
    began_s = time.monotonic()
    assert fetch() == {}
    assert time.monotonic() - began_s >= HOLD_S


def test_a_fetch_that_waits_gets_what_comes(box: Mailbox) -> None:
    reply = Fetch()
    box.fetch(reply)
    box.send(number(5))
    assert names(reply.got.get(timeout=PATIENCE_S)) == ["N"]


def test_a_caller_that_has_died_holds_up_nobody(box: Mailbox) -> None:
    stuck = Stuck()
    box.fetch(stuck)
    for value in range(1000):
        box.send(number(value))
    box.close()
    stuck.over.set()


def test_an_end_that_nobody_comes_for_is_dropped(gone: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNFETCHED_S", 0.05)
    box = Mailbox(gone.set, Backlog(1 << 20))
    box.start()
    box.send(number(1))
    assert not gone.wait(0.3), "the run goes on"
    box.close()
    assert gone.wait(PATIENCE_S)


def test_one_that_was_never_started_has_no_thread() -> None:
    before = threading.active_count()
    for _ in range(10):
        Mailbox(lambda: None, Backlog(1 << 20)).send(number(1))
    assert threading.active_count() == before


def test_answers_that_nobody_fetches_are_bounded_and_freed() -> None:
    """The run ends with an error, for this mailbox alone; what was fetched or thrown away makes room."""
    backlog, gone = Backlog(4000), threading.Event()
    lazy, other = Mailbox(gone.set, backlog), Mailbox(lambda: None, backlog)
    lazy.start()
    for _ in range(4):
        lazy.send({"frames": np.zeros(900, np.uint8)})
    assert backlog.held_bytes == 3600
    lazy.send({"frames": np.zeros(900, np.uint8)})
    assert backlog.held_bytes == 0
    lazy.send({"frames": np.zeros(900, np.uint8)})
    assert backlog.held_bytes == 0, "the run has ended"
    fetch = Fetch()
    lazy.fetch(fetch)
    refusal = fetch.got.get(timeout=PATIENCE_S)
    assert isinstance(refusal, WorkerFailed)
    assert "answers may wait to be fetched" in str(refusal)
    assert gone.wait(PATIENCE_S)

    other.start()
    for _ in range(100):
        other.send({"frames": np.zeros(900, np.uint8)})
        fetch = Fetch()
        other.fetch(fetch)
        assert isinstance(fetch.got.get(timeout=PATIENCE_S), dict)
    assert backlog.held_bytes == 0
    other.close()


def test_a_mailbox_whose_thread_dies_tells_those_that_wait(gone: threading.Event) -> None:
    class Broken(Backlog):
        def give_back(self, letters: Iterable[Letter]) -> None:
            if list(letters):
                raise OverflowError("planted")

    died: list[str] = []
    hook, threading.excepthook = threading.excepthook, lambda death: died.append(death.exc_type.__name__)
    try:
        box = Mailbox(gone.set, Broken(1 << 20))
        box.start()
        first, second = Fetch(), Fetch()
        box.fetch(first)
        box.fetch(second)
        box.send(number(1))
        for fetch in (first, second):
            assert isinstance(fetch.got.get(timeout=PATIENCE_S), WorkerFailed)
        assert gone.wait(PATIENCE_S)
        box.join(PATIENCE_S)
    finally:
        threading.excepthook = hook
    assert died == ["OverflowError"]
