"""Runs that outlive their callers, and signs that cancel them, without a server: callers and time are given."""

from pathlib import Path

from stepvideo_serve.errors import RequestCancelled, WorkerFailed
from stepvideo_serve.scheduling.idempotency import Results
from stepvideo_serve.scheduling.kept_results import KeptResults
from stepvideo_serve.scheduling.request_signs import RequestSigns, cancel
from tests.scheduling.test_idempotency import (
    MARK,
    Clock,
    Recorder,
    begin,
    finished,
    is_kept,
    outputs,
    results_for,
    step,
    unwanted,
)


def signs_in(folder: Path) -> RequestSigns:
    signs = RequestSigns(folder, "ti2v")
    signs.begin()
    return signs


def test_a_run_goes_on_without_callers_for_as_long_as_one_asked_for() -> None:
    clock = Clock()
    results, first, second, third = results_for(0, 10_000, clock), Recorder(), Recorder(), Recorder()
    run = results.join("a", MARK, first, None, keep_s=30.0)
    assert run is not None
    assert results.join("a", MARK, second, None) is None, "who asks for nothing does not shorten that"
    first.gone = second.gone = True
    assert not unwanted(run)
    assert isinstance(first.error, RequestCancelled)
    assert isinstance(second.error, RequestCancelled)
    clock.now_s = 29.9
    assert not unwanted(run)
    run.send(step(3))
    assert results.join("a", MARK, third, None) is None, "it is found again"
    assert [int(seen["STEP"][0]) for seen in third.progress] == [3]
    third.gone = True
    clock.now_s = 40.0
    assert not unwanted(run), "its time begins anew"
    clock.now_s = 69.9
    assert not unwanted(run)
    clock.now_s = 70.0
    assert unwanted(run)
    late = Recorder()
    assert results.join("a", MARK, late, None) is not None, "and now it is another run"


def test_what_nobody_waited_for_is_kept_for_as_long_as_one_asked_for() -> None:
    clock = Clock()
    results, caller = results_for(0, 10_000, clock), Recorder()
    run = results.join("a", MARK, caller, None, keep_s=30.0)
    assert run is not None
    caller.gone = True
    assert not unwanted(run)
    clock.now_s = 20.0
    run.finish(outputs())
    clock.now_s = 49.9
    assert is_kept(results, "a")
    clock.now_s = 50.0
    assert not is_kept(results, "a")


def test_a_run_is_cancelled_by_its_id_though_callers_wait(tmp_path: Path) -> None:
    results, first, second = Results(KeptResults(60, 10_000), signs_in(tmp_path)), Recorder(), Recorder()
    run = results.join("a", MARK, first, None, keep_s=3600.0)
    assert run is not None
    results.join("a", MARK, second, None)
    assert not unwanted(run)
    assert cancel(tmp_path, "b") == [], "another id"
    assert cancel(tmp_path, "a") == ["ti2v"]
    assert unwanted(run)
    again = begin(results, Recorder())
    run.fail(RequestCancelled("The request was cancelled by its caller."))
    for caller in (first, second):
        assert isinstance(caller.error, RequestCancelled)
        assert str(caller.error) == "The run of the REQUEST_ID 'a' was cancelled by ti2v_cancel."
    assert not unwanted(again), "the new run of that id goes on"
    again.fail(WorkerFailed("a rank died"))
    assert cancel(tmp_path, "a") == [], "and nothing is known of it any more"
    assert not list(tmp_path.iterdir())


def test_a_kept_result_is_forgotten_by_its_id(tmp_path: Path) -> None:
    results = Results(KeptResults(60, 10_000), signs_in(tmp_path))
    finished(results, "a", outputs())
    finished(results, "b", outputs())
    assert cancel(tmp_path, "a") == ["ti2v"]
    results.forget_cancelled()
    assert results.kept.size_bytes == 1000
    assert cancel(tmp_path, "a") == []
    assert [is_kept(results, request_id) for request_id in "ab"] == [False, True]


def test_signs_go_with_what_they_stand_for(tmp_path: Path) -> None:
    clock = Clock()
    results = Results(KeptResults(60, 10_000, clock=clock), signs_in(tmp_path), clock)
    finished(results, "a", outputs())
    begin(results, Recorder(), "b").fail(WorkerFailed("a rank died"))
    assert len(list(tmp_path.iterdir())) == 1
    clock.now_s = 60.0
    results.forget_cancelled()
    assert not list(tmp_path.iterdir())
    finished(results, "c", outputs())
    signs_in(tmp_path)  # the next process of the model
    assert not list(tmp_path.iterdir())
