"""Jobs on real rank processes: results, reports, cancels, exceptions."""

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepvideo_serve.errors import InvalidRequest, RequestCancelled, ServiceUnavailable, WorkerFailed
from stepvideo_serve.parallel.generation import Ranks
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import ResultEvent, Run, StepEvent
from stepvideo_serve.parallel.shared_memory import Array

MakeGroup = Callable[..., RankGroup]


def result_of(run: Run) -> ResultEvent:
    *_, last = run
    assert isinstance(last, ResultEvent)
    return last


def assert_serves(group: RankGroup) -> None:
    assert result_of(group.run({"do": "echo"}, {"x": np.ones(3)})).tensors["x"].sum() == 3


def test_tensors_make_the_round_trip_and_belong_to_the_caller(make_group: MakeGroup) -> None:
    group = make_group()
    tensors: dict[str, Array] = {
        "latents": np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32),
        "half": np.linspace(0, 1, 7, dtype=np.float16),
        "flag": np.array([True, False]),
        "scalar": np.array(5, np.int64),
        "pixels": np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::2],
        "none": np.empty((0, 3), np.int32),
    }
    result = result_of(group.run({"do": "echo"}, tensors))
    assert result.params == {"rank": 0, "names": list(tensors)}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(result.tensors[name], tensor, strict=True)
    result_of(group.run({"do": "echo"}, {"latents": np.zeros((3, 4, 5, 6), np.float32)}))
    np.testing.assert_array_equal(result.tensors["latents"], tensors["latents"])


def test_the_start_gives_the_leaders_info(make_group: MakeGroup) -> None:
    group = make_group(settings={"model": "tiny"}, size=2, threads_per_rank=3)
    assert not group.healthy
    info = group.start()
    assert info["settings"].pop("rendezvous").startswith("/proc/self/fd/")
    assert info["settings"] == {"model": "tiny", "rank": 0, "world_size": 2, "generation": 1}
    assert info["threads"] == "3"
    assert not info["torch"], "a rank must not load torch before its factory does"
    assert group.healthy
    assert len(set(group.pids)) == 2


def test_reports_come_in_order_and_whole_to_a_slow_reader(make_group: MakeGroup) -> None:
    steps, values = 40, 100_000
    kept = []
    for event in make_group().run({"do": "steps", "steps": steps, "values": values}, {}):
        time.sleep(0.005)  # the worker would be several reports ahead if nothing held it back
        kept.append(event)
    assert [type(event) for event in kept] == [StepEvent] * steps + [ResultEvent]
    for step, event in enumerate(kept[:-1]):
        assert event.params == {"step": step}
        np.testing.assert_array_equal(event.tensors["latent"], np.full(values, step, np.float32), strict=True)


def test_a_cancel_from_another_thread_ends_the_run(make_group: MakeGroup) -> None:
    group = make_group()
    run = group.run({"do": "until_cancelled"}, {})
    assert next(run).params == {"step": 0}
    threading.Timer(0.05, group.cancel).start()
    with pytest.raises(RequestCancelled):
        next(run)
    assert list(run) == []
    assert_serves(group)
    assert group.generation == 1


def test_a_cancel_before_the_first_event_is_not_lost(make_group: MakeGroup) -> None:
    group = make_group()
    run = group.run({"do": "until_cancelled"}, {})
    run.cancel()
    with pytest.raises(RequestCancelled):
        next(run)


def test_a_cancel_while_the_job_is_given_to_the_ranks_is_not_lost(
    make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks do not know the job yet. They heard of the cancel first, ignored it, and were killed a minute later."""
    group = make_group()
    give = Ranks.begin_job

    def overtaken(ranks: Ranks, *job: Any) -> None:
        group.cancel()
        give(ranks, *job)

    monkeypatch.setattr(Ranks, "begin_job", overtaken)
    with pytest.raises(RequestCancelled):
        result_of(group.run({"do": "until_cancelled"}, {}))
    monkeypatch.undo()
    assert_serves(group)
    assert group.generation == 1, "the ranks have obeyed"


def test_a_cancel_reaches_a_worker_that_waits_for_a_slow_reader(make_group: MakeGroup) -> None:
    group = make_group()
    run = group.run({"do": "steps", "steps": 1000, "values": 1000}, {})
    next(run)
    group.cancel()
    with pytest.raises(RequestCancelled):
        next(run)
    assert_serves(group)


def test_a_late_cancel_does_not_touch_the_next_job(make_group: MakeGroup) -> None:
    group = make_group()
    run = group.run({"do": "echo"}, {})
    result_of(run)
    following = group.run({"do": "steps", "steps": 3, "values": 1}, {})
    run.cancel()
    run.close()
    assert len(list(following)) == 4
    group.cancel()
    assert_serves(group)


def test_a_worker_that_ignores_the_cancel_is_replaced(make_group: MakeGroup) -> None:
    group = make_group(cancel_grace_s=0.3)
    run = group.run({"do": "deaf"}, {})
    next(run)
    run.cancel()
    with pytest.raises(RequestCancelled):
        next(run)
    assert_serves(group)
    assert group.generation == 2


def test_a_first_step_that_does_not_end_is_given_up(make_group: MakeGroup) -> None:
    group = make_group(first_step_timeout_s=0.5)
    with pytest.raises(WorkerFailed, match=r"rank 0 has been in step 1 for 0\.\d s, when 0\.5 s are allowed"):
        list(group.run({"do": "deaf"}, {}))
    assert_serves(group)
    assert group.generation == 2


def test_leaving_a_run_early_frees_the_group(make_group: MakeGroup) -> None:
    group = make_group()
    for _ in group.run({"do": "until_cancelled"}, {}):
        break
    gc.collect()
    assert_serves(group)
    with group.run({"do": "until_cancelled"}, {}) as run:
        next(run)
    assert_serves(group)
    assert group.generation == 1


def test_a_second_run_at_the_same_time_is_refused(make_group: MakeGroup) -> None:
    group = make_group()
    with group.run({"do": "until_cancelled"}, {}), pytest.raises(ServiceUnavailable, match="busy"):
        group.run({"do": "echo"}, {})


def test_a_request_error_keeps_its_nearest_class(make_group: MakeGroup) -> None:
    group = make_group()
    with pytest.raises(InvalidRequest) as caught:
        list(group.run({"do": "fail", "error": "prompt", "message": "The prompt has 400 tokens."}, {}))
    assert type(caught.value) is InvalidRequest
    assert str(caught.value) == "The prompt has 400 tokens."
    assert_serves(group)


def test_any_other_exception_is_one_sentence_and_the_traceback_goes_to_the_log(
    make_group: MakeGroup, capfd: pytest.CaptureFixture[str]
) -> None:
    group = make_group()
    with pytest.raises(WorkerFailed) as caught:
        list(group.run({"do": "fail", "error": "value", "message": "bad\nshape"}, {}))
    assert str(caught.value) == "Rank 0 failed while it ran the request: ValueError: bad shape."
    assert "Traceback" in capfd.readouterr().err
    assert_serves(group)
    with pytest.raises(WorkerFailed, match="TypeError: Object of type object is not JSON serializable"):
        list(group.run({"do": "unserialisable"}, {}))
    assert_serves(group)
    assert group.generation == 1


def test_too_large_tensors_are_refused_on_both_sides(make_group: MakeGroup) -> None:
    group = make_group(arena_bytes=4096)
    with pytest.raises(InvalidRequest, match="need 8000 bytes of shared memory and 4096"):
        group.run({"do": "echo"}, {"x": np.zeros(1000)})
    with pytest.raises(InvalidRequest, match="need 8000 bytes of shared memory and 4096"):
        list(group.run({"do": "steps", "steps": 1, "values": 2000}, {}))
    assert_serves(group)


def test_two_ranks_both_work_and_the_leader_alone_reports(make_group: MakeGroup) -> None:
    group = make_group(size=2)
    events = list(group.run({"do": "steps", "steps": 5, "values": 10}, {}))
    assert [event.params for event in events] == [*({"step": step} for step in range(5)), {"steps": 5}]
    assert result_of(group.run({"do": "echo"}, {"x": np.ones(2)})).params["rank"] == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_one_failing_rank_stops_the_other(make_group: MakeGroup, rank: int) -> None:
    group = make_group(size=2)
    with pytest.raises(WorkerFailed, match=f"Rank {rank} failed .* ValueError: boom"):
        list(group.run({"do": "fail", "rank": rank, "error": "value", "message": "boom"}, {}))
    assert_serves(group)
    assert group.generation == 1


def test_wrong_arguments_are_refused_at_once(make_group: MakeGroup) -> None:
    with pytest.raises(ValueError, match="at least 1 rank"):
        make_group(size=0)
    with pytest.raises(ValueError, match="must leave rank, world_size to the group"):
        make_group(settings={"rank": 3, "world_size": 4})


def test_a_closed_group_says_so(make_group: MakeGroup) -> None:
    group = make_group()
    group.start()
    pids = group.pids
    group.close()
    group.close()
    assert pids
    assert group.pids == ()
    with pytest.raises(ServiceUnavailable, match="closed"):
        group.run({"do": "echo"}, {})
