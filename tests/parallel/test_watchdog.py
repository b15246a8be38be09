"""Who is silent and who is stuck, from times alone."""

import pytest

from stepvideo_serve.parallel.watchdog import Heartbeats, StepClock

STEP_SLACK_S = 2.0


def test_a_rank_is_silent_when_a_beat_is_overdue() -> None:
    beats = Heartbeats(3, 0.5, now_s=10.0)
    beats.sign(0, 10.5)
    beats.sign(2, 10.1)
    assert beats.silent(10.75) == {}
    assert beats.silent(11.0) == {1: 2.0, 2: pytest.approx(1.8)}
    beats.sign(1, 11.0)
    assert list(beats.silent(11.1)) == [2]


def test_a_parent_that_was_away_excuses_all_ranks() -> None:
    beats = Heartbeats(2, 0.5, now_s=0.0)
    clock = StepClock(2, None, STEP_SLACK_S, now_s=0.0)
    for rank in (0, 1):
        clock.mark(rank, 0.1)
    beats.excuse(60.0)
    clock.excuse(60.0)
    assert beats.silent(60.7) == {}
    assert clock.stuck(61.0) is None
    for rank in (0, 1):
        clock.mark(rank, 60.2)
    assert clock.stuck(60.2 + STEP_SLACK_S + 0.2) is not None, "the time away counts as no step"


def test_the_first_step_has_a_limit_of_its_own() -> None:
    assert StepClock(2, None, STEP_SLACK_S, now_s=0.0).stuck(1e6) is None
    clock = StepClock(2, 5.0, STEP_SLACK_S, now_s=0.0)
    clock.mark(1, 4.0)
    assert clock.stuck(4.9) is None
    assert clock.stuck(5.1) == "rank 0 has been in step 1 for 5.1 s, when the longest step so far took 4.0 s"
    assert StepClock(1, 5.0, STEP_SLACK_S, now_s=0.0).stuck(5.1) == (
        "rank 0 has been in step 1 for 5.1 s, when 5 s are allowed for the first step"
    )


def test_a_step_may_take_a_little_longer_than_the_longest_so_far() -> None:
    clock = StepClock(2, 60.0, STEP_SLACK_S, now_s=0.0)
    for now_s in (3.0, 4.0, 5.0):
        clock.mark(0, now_s)
        clock.mark(1, now_s)
    assert clock.stuck(5.0 + 3.0 + STEP_SLACK_S - 0.01) is None
    assert clock.stuck(5.0 + 3.0 + STEP_SLACK_S + 0.01) == (
        "ranks 0, 1 have been in step 4 for 5.0 s, when the longest step so far took 3.0 s"
    )
    clock.mark(1, 9.0)
    assert clock.stuck(10.9) is None
    assert clock.stuck(11.1) == "rank 0 has been in step 4 for 6.1 s, when the longest step so far took 4.0 s"


def test_who_has_ended_the_job_is_not_stuck() -> None:
    clock = StepClock(2, 1.0, STEP_SLACK_S, now_s=0.0)
    clock.ended(0)
    clock.ended(1)
    clock.mark(1, 50.0)
    assert clock.stuck(100.0) is None
