"""Requests that share a run or a result, without a server: callers are recorded, time is given."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepvideo_serve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    WorkerFailed,
)
from stepvideo_serve.scheduling.idempotency import MAX_CALLERS, Results, SharedAnswer, fingerprint, repeated
from stepvideo_serve.scheduling.kept_results import KeptResults

Outputs = Mapping[str, NDArray[Any]]
MARK = b"inputs"


@dataclass
class Recorder:
    """Someone who waits for an answer, and remembers all of it."""

    progress: list[Outputs] = field(default_factory=list)
    result: Outputs | None = None
    error: BaseException | None = None
    gone: bool = False
    broken: bool = False

    def send(self, outputs: Outputs) -> None:
        if self.broken:
            raise RuntimeError("the connection is broken")
        self.progress.append(outputs)

    def finish(self, outputs: Outputs) -> None:
        assert self.open
        self.result = outputs

    def fail(self, error: BaseException) -> None:
        assert self.open
        self.error = error

    def cancelled(self) -> bool:
        return self.gone

    def dismiss_gone(self) -> None:
        """Does nothing."""

    @property
    def open(self) -> bool:
        return self.result is None and self.error is None

    @property
    def report(self) -> dict[str, Any]:
        assert self.result is not None
        report: dict[str, Any] = json.loads(self.result["REPORT"].flat[0])
        return report


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def outputs(size_bytes: int = 1000, **report: Any) -> Outputs:
    """A result of exactly that size."""
    text = json.dumps({"seed": 7, **report}).encode()
    video = bytes(size_bytes - len(text))
    return {"VIDEO": np.array([video], np.object_), "REPORT": np.array([text], np.object_)}


def step(number: int) -> Outputs:
    return {"STEP": np.array([number], np.int32), "PREVIEW": np.array([b"jpeg"], np.object_)}


def results_for(ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> Results:
    return Results(KeptResults(ttl_s, max_bytes, clock=clock), clock=clock)


def begin(results: Results, caller: Recorder, request_id: str = "a", mark: bytes = MARK) -> SharedAnswer:
    run = results.join(request_id, mark, caller, None)
    assert run is not None
    return run


def finished(results: Results, request_id: str, result: Outputs) -> None:
    begin(results, Recorder(), request_id).finish(result)


def is_kept(results: Results, request_id: str) -> bool:
    """Whether a repeat is answered at once. (If not, its run fails, so that nothing is left of it.)"""
    caller = Recorder()
    run = results.join(request_id, MARK, caller, None)
    if run is not None:
        run.fail(WorkerFailed("only asked"))
    return caller.result is not None


def unwanted(run: SharedAnswer) -> bool:
    """As whoever computes asks: callers who have left are answered first."""
    run.dismiss_gone()
    return run.cancelled()


def test_all_callers_get_the_progress_and_the_result() -> None:
    results, first, second = results_for(60, 10_000), Recorder(), Recorder()
    run = begin(results, first)
    run.send(step(1))
    assert results.join("a", MARK, second, None) is None
    run.send(step(2))
    run.finish(outputs())
    assert [int(seen["STEP"][0]) for seen in first.progress] == [1, 2]
    assert [int(seen["STEP"][0]) for seen in second.progress] == [1, 2], "it hears at once how far the run is"
    assert ["PREVIEW" in seen for seen in second.progress] == [False, True], "but an old preview is not sent again"
    assert first.report == {"seed": 7}
    assert second.report == {"seed": 7, "repeated": True}
    assert first.result is not None
    assert second.result is not None
    assert second.result["VIDEO"][0] == first.result["VIDEO"][0]


def test_a_repeat_afterwards_gets_the_same_result_at_once() -> None:
    results, again = results_for(60, 10_000), Recorder()
    finished(results, "a", outputs())
    assert results.join("a", MARK, again, None) is None
    assert again.report == {"seed": 7, "repeated": True}
    assert results.join("b", MARK, Recorder(), None) is not None, "another id is another request"


def test_the_same_id_with_other_inputs_is_refused_while_running_and_afterwards() -> None:
    results, caller = results_for(60, 10_000), Recorder()
    run = begin(results, caller)
    with pytest.raises(InvalidRequest, match="REQUEST_ID 'a' must come with the inputs that it came with before"):
        results.join("a", b"others", Recorder(), None)
    run.finish(outputs())
    with pytest.raises(InvalidRequest):
        results.join("a", b"others", Recorder(), None)
    assert caller.report == {"seed": 7}


def test_a_caller_that_cancels_leaves_the_others_alone() -> None:
    results, first, second = results_for(60, 10_000), Recorder(), Recorder()
    run = begin(results, first)
    results.join("a", MARK, second, None)
    first.gone = True
    assert not unwanted(run)
    assert isinstance(first.error, RequestCancelled)
    run.send(step(1))
    run.finish(outputs())
    assert first.progress == []
    assert second.report["repeated"]


def test_the_last_one_to_leave_ends_the_run_and_nobody_joins_it_then() -> None:
    results, first, second, third = results_for(60, 10_000), Recorder(), Recorder(), Recorder()
    run = begin(results, first)
    results.join("a", MARK, second, None)
    second.gone = True
    assert not unwanted(run)
    first.gone = True
    assert unwanted(run)
    assert unwanted(run), "for good"
    again = begin(results, third)
    run.fail(RequestCancelled("The request was cancelled by its caller."))
    assert isinstance(first.error, RequestCancelled)
    assert third.open
    assert results.join("a", MARK, Recorder(), None) is None, "the new run goes on, and may be joined"
    again.finish(outputs())
    assert third.report == {"seed": 7}


def test_a_run_that_ends_well_after_all_have_left_is_kept_all_the_same() -> None:
    results, caller = results_for(60, 10_000), Recorder()
    run = begin(results, caller)
    caller.gone = True
    assert unwanted(run)
    run.finish(outputs())
    assert is_kept(results, "a")


def test_the_deadline_of_one_that_joined_is_its_own() -> None:
    clock = Clock()
    results, first, second, third = results_for(60, 10_000, clock), Recorder(), Recorder(), Recorder()
    run = begin(results, first)
    clock.now_s = 10.0
    results.join("a", MARK, second, 5.0)
    clock.now_s = 15.0
    assert not unwanted(run)
    assert second.open
    clock.now_s = 15.1
    assert not unwanted(run)
    assert isinstance(second.error, DeadlineExceeded)
    assert first.open

    results.join("a", MARK, third, 5.0)
    first.gone = True
    clock.now_s = 30.0
    assert unwanted(run)
    run.fail(RequestCancelled("The request was cancelled by its caller."))
    assert isinstance(first.error, RequestCancelled)
    assert isinstance(third.error, DeadlineExceeded), "it did not cancel"


def test_failures_reach_all_and_are_not_kept() -> None:
    results, first, second = results_for(60, 10_000), Recorder(), Recorder()
    run = begin(results, first)
    results.join("a", MARK, second, None)
    error = WorkerFailed("a rank died")
    run.fail(error)
    assert first.error is error
    assert second.error is error
    third = Recorder()
    begin(results, third).finish(outputs())
    assert third.report == {"seed": 7}


def test_one_broken_connection_does_not_concern_the_others() -> None:
    results, first, second = results_for(60, 10_000), Recorder(broken=True), Recorder()
    run = begin(results, first)
    results.join("a", MARK, second, None)
    run.send(step(1))
    run.finish(outputs())
    assert len(second.progress) == 1
    assert second.report["repeated"]


def test_a_result_is_dropped_when_its_time_is_over() -> None:
    clock = Clock()
    results = results_for(60, 10_000, clock)
    finished(results, "a", outputs())
    clock.now_s = 59.9
    assert is_kept(results, "a")
    clock.now_s = 60.0
    assert not is_kept(results, "a")
    assert results.kept.size_bytes == 0


def test_the_oldest_go_first_and_the_bound_is_never_passed() -> None:
    results = results_for(60, 2500)
    for request_id in "abc":
        finished(results, request_id, outputs(1000))
        assert results.kept.size_bytes <= 2500
    assert [is_kept(results, request_id) for request_id in "abc"] == [False, True, True]
    finished(results, "d", outputs(2500))
    assert [is_kept(results, request_id) for request_id in "abcd"] == [False, False, False, True]
    finished(results, "e", outputs(2501))
    assert [is_kept(results, request_id) for request_id in "de"] == [True, False], "too large for all of it"


@pytest.mark.parametrize(("ttl_s", "max_bytes"), [(0, 10_000), (60, 0)])
def test_nothing_is_kept_where_that_is_off_but_runs_are_shared(ttl_s: float, max_bytes: int) -> None:
    results, first, second = results_for(ttl_s, max_bytes), Recorder(), Recorder()
    run = begin(results, first)
    assert results.join("a", MARK, second, None) is None
    run.finish(outputs())
    assert second.report["repeated"]
    assert not is_kept(results, "a")
    assert results.kept.size_bytes == 0


def test_no_more_than_so_many_wait_for_one_run() -> None:
    results = results_for(60, 10_000)
    run = begin(results, Recorder())
    others = [Recorder() for _ in range(MAX_CALLERS - 1)]
    for other in others:
        results.join("a", MARK, other, None)
    with pytest.raises(QueueFull, match=f"At most {MAX_CALLERS} requests may wait for one run"):
        results.join("a", MARK, Recorder(), None)
    others[0].gone = True
    assert not unwanted(run)
    assert results.join("a", MARK, Recorder(), None) is None


def test_of_many_at_the_same_time_one_runs() -> None:
    """Each thread asks, and whoever is given the run ends it: every one of them gets one answer."""
    for _ in range(50):
        results, barrier = results_for(60, 10_000), threading.Barrier(8)
        callers = [Recorder() for _ in range(8)]
        runs: list[SharedAnswer] = []

        def ask(
            caller: Recorder, results: Results = results, barrier: threading.Barrier = barrier, runs: Any = runs
        ) -> None:
            barrier.wait()
            if (run := results.join("a", MARK, caller, None)) is not None:
                runs.append(run)
                run.finish(outputs())

        threads = [threading.Thread(target=ask, args=(caller,)) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(runs) == 1
        assert sorted("repeated" in caller.report for caller in callers) == [False] + [True] * 7


def bytes_tensor(value: bytes) -> NDArray[Any]:
    return np.array([value], np.object_)


def test_the_fingerprint_is_that_of_what_decides_the_result() -> None:
    inputs = {"PROMPT": bytes_tensor(b"a cat"), "SEED": np.array([7], np.int64), "LATENTS": np.ones((2, 3), np.float32)}
    same = fingerprint(inputs)
    free = {
        "REQUEST_ID": bytes_tensor(b"x"),
        "TIMEOUT_S": np.ones(1, np.float32),
        "PREVIEW_EVERY": np.ones(1, np.int32),
        "PREVIEW_FORMAT": bytes_tensor(b"webp"),
        "MAX_RESPONSE_BYTES": np.ones(1, np.int64),
    }
    assert fingerprint(dict(reversed({**inputs, **free, "REQUEST_PRIORITY": np.ones(1, np.int32)}.items()))) == same
    others = [
        {**inputs, "PROMPT": bytes_tensor(b"a dog")},
        {**inputs, "SEED": np.array([8], np.int64)},
        {**inputs, "LATENTS": np.ones((3, 2), np.float32)},
        {**inputs, "LATENTS": np.full((2, 3), 2, np.float32)},
        {"PROMPT": inputs["PROMPT"], "LATENTS": inputs["LATENTS"]},
        {**inputs, "NEGATIVE_PROMPT": bytes_tensor(b"")},
    ]
    assert same not in {fingerprint(other) for other in others}
    moved = [{"PROMPT": bytes_tensor(b"ab"), "IMAGE": bytes_tensor(b"c")}]
    moved.append({"PROMPT": bytes_tensor(b"a"), "IMAGE": bytes_tensor(b"bc")})
    assert len({fingerprint(each) for each in moved}) == 2


def test_a_repeated_result_differs_in_its_report_only() -> None:
    result = outputs(warnings=[])
    again = repeated(result)
    assert again["VIDEO"] is result["VIDEO"]
    assert json.loads(again["REPORT"].flat[0]) == {"seed": 7, "warnings": [], "repeated": True}
    assert "repeated" not in json.loads(result["REPORT"].flat[0])
