"""The queue of runs in front of something that does one at a time, without the server."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepvideo_serve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestError,
    ServiceUnavailable,
)
from stepvideo_serve.serving.run_queue import QueuedRun, RunQueue

PATIENCE_S = 60.0


class Mailbox:
    """Keeps the one answer of a run."""

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[BaseException | str] = queue.SimpleQueue()

    def send(self, outputs: dict[str, NDArray[Any]]) -> None:
        self._answers.put(outputs["DONE"].item())

    def fail(self, error: BaseException) -> None:
        self._answers.put(error)

    def close(self) -> None:
        raise AssertionError("an answer is sent once")

    def answer(self) -> BaseException | str:
        return self._answers.get(timeout=PATIENCE_S)

    @property
    def empty(self) -> bool:
        return self._answers.empty()


class Ranks:
    """Serves runs one at a time, each until it is let go or interrupted."""

    def __init__(self) -> None:
        self.started: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.turn = threading.Semaphore(0)
        self.current: QueuedRun | None = None

    def serve(self, run: QueuedRun) -> None:
        self.current = run
        self.started.put(run.run_id)
        self.turn.acquire()
        if run.cancelled.is_set():
            run.answer.fail(RequestCancelled("cancelled"))
        else:
            run.answer.send({"DONE": np.array(run.run_id)})

    def interrupt(self) -> None:
        assert self.current is not None
        assert self.current.cancelled.is_set(), "the mark comes first"
        self.turn.release()

    def next_started(self) -> str:
        return self.started.get(timeout=PATIENCE_S)


def new_run(run_id: str, timeout_s: float | None = None, **params: object) -> tuple[QueuedRun, Mailbox]:
    mailbox = Mailbox()
    return QueuedRun(run_id, {"timeout_s": timeout_s, **params}, {}, mailbox), mailbox


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def runs(ranks: Ranks) -> Iterator[RunQueue]:
    """Two may wait."""
    created = RunQueue(2, ranks.serve, ranks.interrupt)
    yield created
    for _ in range(10):
        ranks.turn.release()
    created.close()


def put(runs: RunQueue, *run_ids: str) -> list[Mailbox]:
    mailboxes = []
    for run_id in run_ids:
        run, mailbox = new_run(run_id)
        runs.put(run)
        mailboxes.append(mailbox)
    return mailboxes


def occupy(runs: RunQueue, ranks: Ranks) -> Mailbox:
    """A run that is under way."""
    [mailbox] = put(runs, "running")
    assert ranks.next_started() == "running"
    return mailbox


def test_first_in_first_out(runs: RunQueue, ranks: Ranks) -> None:
    mailboxes = [occupy(runs, ranks), *put(runs, "second", "third")]
    for _ in range(3):
        ranks.turn.release()
    assert [mailbox.answer() for mailbox in mailboxes] == ["running", "second", "third"]
    assert [ranks.next_started() for _ in range(2)] == ["second", "third"]


def test_an_urgent_run_goes_before_those_that_wait_and_is_not_refused(runs: RunQueue, ranks: Ranks) -> None:
    occupy(runs, ranks)
    put(runs, "second", "third")
    runs.put(new_run("urgent", urgent=True)[0])
    for _ in range(3):
        ranks.turn.release()
    assert [ranks.next_started() for _ in range(3)] == ["urgent", "second", "third"]


def test_more_than_may_wait_are_refused(runs: RunQueue, ranks: Ranks) -> None:
    occupy(runs, ranks)
    put(runs, "second", "third")
    with pytest.raises(QueueFull, match="At most 2 requests may wait, 2 do"):
        put(runs, "fourth")
    ranks.turn.release()
    assert ranks.next_started() == "second"
    put(runs, "fourth")


def test_with_no_room_to_wait_one_may_run(ranks: Ranks) -> None:
    runs = RunQueue(0, ranks.serve, ranks.interrupt)
    mailbox = occupy(runs, ranks)
    with pytest.raises(QueueFull):
        put(runs, "second")
    ranks.turn.release()
    assert mailbox.answer() == "running"
    runs.close()


def test_without_a_bound_any_number_waits(ranks: Ranks) -> None:
    runs = RunQueue(None, ranks.serve, ranks.interrupt)
    occupy(runs, ranks)
    mailboxes = put(runs, *map(str, range(100)))
    for _ in range(101):
        ranks.turn.release()
    assert [mailbox.answer() for mailbox in mailboxes] == list(map(str, range(100)))
    runs.close()


def test_a_waiting_run_is_cancelled_at_once(runs: RunQueue, ranks: Ranks) -> None:
    running = occupy(runs, ranks)
    second, third = put(runs, "second", "third")
    runs.cancel("second")
    assert isinstance(second.answer(), RequestCancelled)
    ranks.turn.release()
    ranks.turn.release()
    assert (running.answer(), third.answer()) == ("running", "third")
    assert ranks.next_started() == "third"


def test_the_run_under_way_is_interrupted(runs: RunQueue, ranks: Ranks) -> None:
    running = occupy(runs, ranks)
    [second] = put(runs, "second")
    runs.cancel("running")
    assert isinstance(running.answer(), RequestCancelled)
    ranks.turn.release()
    assert second.answer() == "second"


def test_cancelling_what_has_ended_or_never_was_does_nothing(runs: RunQueue, ranks: Ranks) -> None:
    running = occupy(runs, ranks)
    ranks.turn.release()
    assert running.answer() == "running"
    [second] = put(runs, "second")
    assert ranks.next_started() == "second"
    runs.cancel("running")
    runs.cancel("never was")
    assert second.empty
    ranks.turn.release()
    assert second.answer() == "second"


def test_a_run_whose_time_is_over_is_answered_while_it_waits(runs: RunQueue, ranks: Ranks) -> None:
    running = occupy(runs, ranks)
    run, late = new_run("late", timeout_s=0.05)
    runs.put(run)
    error = late.answer()
    assert isinstance(error, DeadlineExceeded)
    assert "while the request waited" in str(error)
    assert running.empty
    put(runs, "late", "third")  # its place and its name are free again


def test_a_run_that_has_begun_is_left_to_whoever_serves_it(runs: RunQueue, ranks: Ranks) -> None:
    run, mailbox = new_run("run", timeout_s=0.05)
    runs.put(run)
    assert ranks.next_started() == "run"
    expired, late = new_run("late", timeout_s=0.1)
    runs.put(expired)
    assert isinstance(late.answer(), DeadlineExceeded)  # by now the first one's time is over too
    assert mailbox.empty
    with pytest.raises(DeadlineExceeded):
        run.remaining_s()
    ranks.turn.release()
    assert mailbox.answer() == "run"


def test_a_run_without_time_is_refused(runs: RunQueue) -> None:
    with pytest.raises(DeadlineExceeded):
        runs.put(new_run("late", timeout_s=0.0)[0])


@pytest.mark.parametrize("taken", ["running", "second"])
def test_a_name_is_given_once(runs: RunQueue, ranks: Ranks, taken: str) -> None:
    occupy(runs, ranks)
    put(runs, "second")
    with pytest.raises(InvalidRequest, match=f"RUN_ID must be new, got '{taken}'"):
        put(runs, taken)


def test_closing_ends_all_runs(ranks: Ranks) -> None:
    runs = RunQueue(2, ranks.serve, ranks.interrupt)
    mailboxes = [occupy(runs, ranks), *put(runs, "second", "third")]
    runs.close()
    answers = [mailbox.answer() for mailbox in mailboxes]
    assert all(isinstance(answer, RequestError) for answer in answers)
    assert [type(answer) for answer in answers] == [RequestCancelled, ServiceUnavailable, ServiceUnavailable]
    with pytest.raises(ServiceUnavailable, match="shutting down"):
        put(runs, "late")
