"""The queue of runs in front of something that does one at a time, without the server."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from stepvideo_serve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestError,
    ServiceUnavailable,
)
from stepvideo_serve.scheduling.run_queue import (
    HIGH,
    LOW,
    NORMAL,
    URGENT,
    QueuedRun,
    QueueRules,
    RunQueue,
)
from tests.scheduling.queue_doubles import Mailbox, Ranks, new_queue, new_run


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def runs(ranks: Ranks) -> Iterator[RunQueue]:
    """Two may wait."""
    created = new_queue(ranks, 2)
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
    runs.put(new_run("urgent", priority=URGENT)[0])
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
    runs = new_queue(ranks, 0)
    mailbox = occupy(runs, ranks)
    with pytest.raises(QueueFull):
        put(runs, "second")
    ranks.turn.release()
    assert mailbox.answer() == "running"
    runs.close()


def test_without_a_bound_any_number_waits(ranks: Ranks) -> None:
    runs = new_queue(ranks, None)
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
    runs = new_queue(ranks, 2)
    mailboxes = [occupy(runs, ranks), *put(runs, "second", "third")]
    runs.close()
    answers = [mailbox.answer() for mailbox in mailboxes]
    assert all(isinstance(answer, RequestError) for answer in answers)
    assert [type(answer) for answer in answers] == [RequestCancelled, ServiceUnavailable, ServiceUnavailable]
    with pytest.raises(ServiceUnavailable, match="shutting down"):
        put(runs, "late")


def put_new(runs: RunQueue, run_id: str, **params: Any) -> tuple[QueuedRun, Mailbox]:
    run, mailbox = new_run(run_id, **params)
    runs.put(run)
    return run, mailbox


def started(ranks: Ranks, count: int) -> list[str]:
    """Lets run after run end."""
    for _ in range(count):
        ranks.turn.release()
    return [ranks.next_started() for _ in range(count)]


def test_a_higher_priority_goes_first_and_equal_ones_by_arrival(ranks: Ranks) -> None:
    runs = new_queue(ranks, None)
    occupy(runs, ranks)
    for run_id, priority in [("low", LOW), ("high", HIGH), ("low again", LOW), ("high again", HIGH)]:
        put_new(runs, run_id, priority=priority)
    put(runs, "normal")
    assert started(ranks, 5) == ["high", "high again", "normal", "low", "low again"]
    ranks.turn.release()
    runs.close()


def test_a_run_that_has_waited_long_is_raised(ranks: Ranks) -> None:
    runs = new_queue(ranks, None, aging_s=60.0)
    occupy(runs, ranks)
    old, _ = new_run("old", priority=LOW)
    runs.put(replace(old, accepted_s=old.accepted_s - 121.0))
    put_new(runs, "high", priority=HIGH)
    put(runs, "normal")
    assert started(ranks, 3) == ["old", "high", "normal"]
    ranks.turn.release()
    runs.close()


def test_a_higher_priority_parks_the_run_under_way_which_goes_on_afterwards(ranks: Ranks) -> None:
    runs = new_queue(ranks, None, max_parks=1)
    low, low_answer = put_new(runs, "low", priority=LOW, parkable=True)
    assert ranks.next_started() == "low"
    put(runs, "normal")  # parks it: the one time that it may be
    assert ranks.next_started() == "normal"
    put_new(runs, "high", priority=HIGH)  # "normal" cannot be parked
    assert started(ranks, 2) == ["high", "low"]
    put_new(runs, "another", priority=HIGH)
    assert low.state.parks == 1
    ranks.turn.release()
    assert low_answer.answer() == "low"
    assert ranks.next_started() == "another"
    ranks.turn.release()
    runs.close()


def test_what_cannot_be_parked_again_is_waited_for_in_the_estimate(ranks: Ranks) -> None:
    runs = new_queue(ranks, None, max_parks=0)
    put_new(runs, "running", seconds=10.0, parkable=True)
    assert ranks.next_started() == "running"
    _, high = put_new(runs, "high", priority=HIGH, seconds=1.0, parkable=True)
    assert high.place() == (1, 10.0)
    ranks.turn.release()
    ranks.turn.release()
    runs.close()


def test_those_that_wait_for_a_cancelled_step_hear_how_long_it_takes() -> None:
    class SlowToStop(Ranks):
        def interrupt(self) -> None:
            """The step under way goes on until the test lets it go."""

    ranks, left = SlowToStop(), [60.0, 30.0, None]
    runs = RunQueue(
        QueueRules(None, 1), ranks.serve, ranks.interrupt, ranks.seconds_of, stop_seconds_of=lambda _: left[0]
    )
    put_new(runs, "running", seconds=500.0, parkable=True)
    assert ranks.next_started() == "running"
    _, next_one = put_new(runs, "next", seconds=1.0, parkable=True)
    assert next_one.place() == (1, 500.0)
    runs.cancel("running")
    assert next_one.place() == (1, 60.0)
    left.pop(0)
    _, last = put_new(runs, "last", seconds=1.0, parkable=True)
    assert (next_one.place(), last.place()) == ((1, 30.0), (2, 31.0))
    left.pop(0)
    assert runs.forecast(NORMAL) == (2, None), "not nothing, but unknown"
    for _ in range(3):
        ranks.turn.release()
    runs.close()


def test_those_ahead_of_a_run_that_gives_way_wait_for_its_step() -> None:
    ranks = Ranks()
    runs = RunQueue(QueueRules(None, 1), ranks.serve, lambda: None, ranks.seconds_of, stop_seconds_of=lambda _: 40.0)
    put_new(runs, "running", seconds=500.0, parkable=True)
    assert ranks.next_started() == "running"
    _, high = put_new(runs, "high", priority=HIGH, seconds=1.0, parkable=True)
    assert high.place() == (1, 40.0)
    for _ in range(3):
        ranks.turn.release()
    runs.close()


def test_an_urgent_run_parks_without_being_counted(ranks: Ranks) -> None:
    runs = new_queue(ranks, None, max_parks=0)
    run, mailbox = put_new(runs, "run", parkable=True)
    assert ranks.next_started() == "run"
    put_new(runs, "urgent", priority=URGENT)
    assert ranks.next_started() == "urgent"
    ranks.turn.release()
    assert ranks.next_started() == "run"
    assert run.state.parks == 0
    ranks.turn.release()
    assert mailbox.answer() == "run"
    runs.close()


@pytest.mark.parametrize("end", ["cancel", "close", "deadline"])
def test_a_parked_run_can_be_ended(ranks: Ranks, end: str) -> None:
    runs = new_queue(ranks, None, max_parks=1)
    _, mailbox = put_new(runs, "parked", parkable=True, timeout_s=0.5 if end == "deadline" else None)
    assert ranks.next_started() == "parked"
    put_new(runs, "high", priority=HIGH)
    assert ranks.next_started() == "high"
    if end == "cancel":
        runs.cancel("parked")
    elif end == "close":
        runs.close()
    error = mailbox.answer()
    assert type(error) is {"cancel": RequestCancelled, "close": ServiceUnavailable, "deadline": DeadlineExceeded}[end]
    ranks.turn.release()
    runs.close()


def test_those_that_wait_are_told_their_place_and_when_they_begin(ranks: Ranks) -> None:
    runs = new_queue(ranks, None)
    put_new(runs, "running", seconds=10.0)
    assert ranks.next_started() == "running"
    _, second = put_new(runs, "second", seconds=20.0, parkable=True)
    _, third = put_new(runs, "third", seconds=30.0, parkable=True)
    assert (second.place(), third.place()) == ((1, 10.0), (2, 30.0))
    _, unknown = put_new(runs, "unknown", priority=HIGH, parkable=True)
    assert (unknown.place(), third.places.qsize()) == ((1, 10.0), 1)
    assert third.place() == (3, None)
    ranks.turn.release()
    assert ranks.next_started() == "unknown"
    while (place := third.place()) != (2, None):
        assert place[0] == 3
    for _ in range(3):
        ranks.turn.release()
    runs.close()


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(ranks: Ranks) -> None:
    runs = new_queue(ranks, None)
    put_new(runs, "running", seconds=10.0)
    assert ranks.next_started() == "running"
    with pytest.raises(DeadlineExceeded, match=r"about 10\.0 s of waiting and 5\.0 s of denoising are ahead"):
        put_new(runs, "late", seconds=5.0, timeout_s=14.0)
    put_new(runs, "kept", seconds=5.0, timeout_s=16.0)
    ranks.turn.release()
    ranks.turn.release()
    runs.close()


def test_a_full_queue_says_how_long_it_would_take(ranks: Ranks) -> None:
    runs = new_queue(ranks, 1)
    put_new(runs, "running", seconds=10.0)
    assert ranks.next_started() == "running"
    put_new(runs, "second", seconds=20.0)
    with pytest.raises(QueueFull, match="At most 1 requests may wait, 1 do, which would take about 30 s"):
        put_new(runs, "third", seconds=1.0)
    ranks.turn.release()
    ranks.turn.release()
    runs.close()
