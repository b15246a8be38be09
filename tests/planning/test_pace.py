"""The ledger of measured rates, by its own arithmetic; nothing here runs a server."""

import itertools
import time

import numpy as np
import pytest

from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.planning.model_size import PUBLISHED
from stepvideo_serve.planning.pace import SIZES_KEPT, WORK, Ledger, Pace, Rate, TurnPace

SMALL = DiTConfig(2, 3, 8, 8, 1, 16, 16)


def rate_of(*points: tuple[float, float]) -> Rate:
    return Rate(points)


def test_nothing_is_known_before_the_first_measurement() -> None:
    assert Rate().seconds(1.0) is None
    assert Ledger().seconds("text", 1.0) is None
    assert Ledger().points() == {}


def test_one_size_is_a_rate() -> None:
    rate = rate_of((100.0, 2.0))
    assert [rate.seconds(work) for work in (50.0, 100.0, 300.0)] == [1.0, 2.0, 6.0]


def test_between_sizes_is_a_straight_line_and_beyond_them_the_fixed_part_stays() -> None:
    rate = rate_of((100.0, 3.0), (300.0, 7.0))  # 1 + work / 50
    for work in (10.0, 100.0, 150.0, 300.0, 1000.0):
        assert rate.seconds(work) == pytest.approx(1.0 + work / 50.0, rel=1e-12)


def test_a_first_measurement_is_forgotten_and_later_ones_are_averaged() -> None:
    assert rate_of((100.0, 9.0), (100.0, 2.0)).points() == [(100.0, 2.0)]
    assert rate_of((100.0, 9.0), (100.0, 2.0), (100.0, 4.0)).points() == [(100.0, 3.0)]
    [(work, seconds)] = rate_of((100.0, 9.0), *[(100.0, 2.0)] * 20, (100.0, 7.0)).points()
    assert work == 100.0
    assert seconds == pytest.approx(3.0)


def test_a_machine_that_became_slower_is_slower_at_every_size() -> None:
    points = [(100.0, 1.0), (400.0, 4.0)]
    rate = Rate([*points * 3, *[(100.0, 1.5)] * 30])
    assert rate.seconds(400.0) == pytest.approx(6.0, rel=0.01)
    assert rate.seconds(200.0) == pytest.approx(3.0, rel=0.01)
    for _ in range(30):
        rate.note(400.0, 4.0)
    assert rate.seconds(100.0) == pytest.approx(1.0, rel=0.01)


def test_a_size_that_is_warming_up_says_nothing_of_the_others() -> None:
    assert rate_of((100.0, 1.0), (100.0, 1.0), (400.0, 9.0), (400.0, 4.0)).points() == [(100.0, 1.0), (400.0, 4.0)]


def test_amounts_that_hardly_differ_share_an_average() -> None:
    rate = rate_of((1000.0, 5.0), (1001.0, 2.0), (1000.0, 4.0))
    [(work, seconds)] = rate.points()
    assert (work, seconds) == (1000.5, 3.0)


def test_more_work_never_takes_less_time_whatever_was_measured() -> None:
    draws = np.random.default_rng(1)
    for _ in range(50):
        rate = Rate(draws.uniform(1.0, 100.0, (12, 2)).tolist())
        predicted = [rate.seconds(work) for work in np.linspace(0.1, 200.0, 400)]
        assert all(low <= high * (1 + 1e-12) for low, high in itertools.pairwise(predicted))  # type: ignore[operator]


def test_sizes_not_seen_for_long_are_dropped() -> None:
    rate = Rate([(2.0**size, 1.0) for size in range(SIZES_KEPT + 5)])
    assert [work for work, _ in rate.points()] == [2.0**size for size in range(5, SIZES_KEPT + 5)]


@pytest.mark.parametrize(
    ("stage", "work", "seconds"),
    [("lunch", 1.0, 1.0), ("text", 0.0, 1.0), ("text", float("nan"), 1.0), ("text", 1.0, -1.0), ("text", 1.0, np.inf)],
)
def test_what_cannot_be_is_refused(stage: str, work: float, seconds: float) -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="cannot have done"):
        ledger.note(stage, work, seconds)
    assert ledger.points() == {}


def test_stages_do_not_mix() -> None:
    ledger = Ledger()
    for index, stage in enumerate(WORK, start=1):
        ledger.note(stage, 10.0, float(index))
    assert {stage: ledger.seconds(stage, 20.0) for stage in WORK} == {
        stage: 2.0 * index for index, stage in enumerate(WORK, start=1)
    }


def states(frames: int, guided: bool) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    texts = {f"{name}_{kind}": np.zeros((length, 1)) for name in ("positive", "negative")[: 1 + guided]
             for kind, length in (("llm", 20), ("clip", 77))}  # fmt: skip
    return {"latents": np.zeros((frames, 8, 4, 6), np.float32), **texts}


def test_a_run_takes_what_its_flops_take() -> None:
    pace = Pace(SMALL)
    assert pace.step_seconds(states(3, True)) is None
    pace.note(states(3, True), 0.5)
    assert pace.step_seconds(states(3, True)) == pytest.approx(0.5)
    ratio = pace.step_flops(states(6, True)) / pace.step_flops(states(3, True))
    assert ratio > 2.0
    assert pace.step_seconds(states(6, True)) == pytest.approx(0.5 * ratio)
    assert pace.step_flops(states(3, False)) * 2 == pace.step_flops(states(3, True))


def test_how_long_the_step_under_way_still_takes() -> None:
    pace = Pace(SMALL)
    turn = TurnPace(pace, states(3, True))
    assert turn.step_left_s() is None, "nothing is known"
    turn.step(10.0)
    left_s = turn.step_left_s()
    assert left_s is not None
    assert 9.0 < left_s <= 10.0
    pace.ledger.note("prepare", pace.tokens(states(3, True)), 5.0)
    beginning_s = TurnPace(pace, states(3, True)).step_left_s()
    assert beginning_s is not None
    assert left_s < beginning_s <= 15.0, "its first step is prepared first"

    fast = Pace(SMALL)
    fast.note(states(3, True), 0.01)
    late = TurnPace(fast, states(3, True))
    time.sleep(0.05)
    assert late.step_left_s() is None, "longer than any before: nobody knows how long"


def test_flops_of_the_published_model() -> None:
    """7,288 TFLOP for 102 frames of 544x992 with guidance, counted on the official network; without what surrounds the
    blocks and what is computed once per request."""
    latents = np.broadcast_to(np.float32(0), (18, 64, 34, 62))
    texts = {f"{name}_{kind}": np.broadcast_to(np.float32(0), (length, 1)) for name in ("positive", "negative")
             for kind, length in (("llm", 320), ("clip", 77))}  # fmt: skip
    assert Pace(PUBLISHED.dit).step_flops({"latents": latents, **texts}) == pytest.approx(7288e12, rel=0.005)
