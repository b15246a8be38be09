"""A cancelled step has the time of any other: ranks that are in it live, whatever the grace. With real gloo ranks."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from stepvideo_serve.errors import RequestCancelled
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import ResultEvent, Run

STEP_S = 1.5
GRACE_S = 0.2  # far less than a step
STEP_SLACK_S = 0.5
LATENTS = {"latents": np.ones(4, np.float32)}


@pytest.fixture
def group(make_gloo_group: Callable[[float], RankGroup]) -> RankGroup:
    return make_gloo_group(60.0)


@pytest.fixture
def make_gloo_group(rank_env: dict[str, str]) -> Iterator[Callable[[float], RankGroup]]:
    groups: list[RankGroup] = []

    def make(first_step_timeout_s: float) -> RankGroup:
        made = RankGroup(
            "gloo_ranks:gloo",
            {},
            size=2,
            start_timeout_s=120.0,
            arena_bytes=1 << 16,
            threads_per_rank=1,
            first_step_timeout_s=first_step_timeout_s,
            step_slack_s=STEP_SLACK_S,
            cancel_grace_s=GRACE_S,
            env=rank_env,
        )
        groups.append(made)
        made.start()
        return made

    yield make
    for made in groups:
        made.close()


def begin(group: RankGroup, **params: object) -> Run:
    return group.run({"start_step": 0, "steps": 50, "timeout_s": None, "step_s": STEP_S, **params}, LATENTS)


def cancelled_after_s(run: Run) -> float:
    """How long the ranks took to obey, until the run had ended."""
    began_s = time.monotonic()
    run.cancel()
    with pytest.raises(RequestCancelled):
        list(run)
    return time.monotonic() - began_s


def assert_the_same_ranks_serve(group: RankGroup, pids: tuple[int, ...]) -> None:
    events = list(begin(group, steps=2, step_s=0.0))
    assert isinstance(events[-1], ResultEvent)
    assert (group.generation, group.pids, group.last_loss) == (1, pids, None)


@pytest.mark.parametrize("steps_before", [0, 1, 2])
def test_ranks_in_a_slow_step_end_it_and_live(group: RankGroup, steps_before: int) -> None:
    pids = group.pids
    run = begin(group)
    for _ in range(steps_before):
        next(run)
    time.sleep(0.3)  # into the step
    took_s = cancelled_after_s(run)
    assert GRACE_S + STEP_SLACK_S < took_s < 1.5 * STEP_S, "after the step under way, which the grace did not cut"
    assert_the_same_ranks_serve(group, pids)


def test_a_cancel_just_before_the_end_of_a_step_may_take_the_next_one(group: RankGroup) -> None:
    pids = group.pids
    run = begin(group)
    next(run)  # comes as the step ends: the cancel reaches the ranks before or after they have asked for one
    assert cancelled_after_s(run) < 2.5 * STEP_S
    assert_the_same_ranks_serve(group, pids)


@pytest.mark.parametrize(("stuck_in", "first_step_timeout_s"), [(0, 1.0), (1, 60.0)])
def test_a_cancelled_step_that_hangs_ends_as_any_other(
    make_gloo_group: Callable[[float], RankGroup], tmp_path: Path, stuck_in: int, first_step_timeout_s: float
) -> None:
    group = make_gloo_group(first_step_timeout_s)
    fault = {"how": "stuck", "when": [[1, 1, stuck_in]], "log": str(tmp_path / "fault")}
    run = begin(group, fault=fault, step_s=0.2)
    for _ in range(stuck_in):
        next(run)
    limit_s = first_step_timeout_s if stuck_in == 0 else 0.2 + STEP_SLACK_S
    assert cancelled_after_s(run) < limit_s + 1.5  # until the processes are gone
    assert group.last_loss is not None
    assert f"been in step {stuck_in + 1} for" in group.last_loss.reason
    assert isinstance(list(begin(group, steps=1, step_s=0.0))[-1], ResultEvent)
    assert group.generation == 2


def test_steps_that_go_on_after_a_cancel_are_ended(make_group: Callable[..., RankGroup]) -> None:
    group = make_group(cancel_grace_s=GRACE_S, first_step_timeout_s=60.0)
    run = group.run({"do": "deaf_steps"}, {})
    next(run)
    assert cancelled_after_s(run) < GRACE_S + 1.0
    assert group.last_loss is not None
    assert "did not stop in time" in group.last_loss.reason
