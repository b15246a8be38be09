"""Ranks that fail: noticed in time, started anew, the request goes on; with real processes and real collectives."""

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stepvideo_serve.errors import DeadlineExceeded, RequestCancelled, ServiceUnavailable, WorkerFailed
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import ERROR_GRACE_S, StepEvent
from stepvideo_serve.parallel.watchdog import DEAD_BEATS
from stepvideo_serve.scheduling.resume import run_on
from tests.parallel.failing import LOST_DEVICE
from tests.parallel.faults import (
    FAULTS,
    FIRST_STEP_S,
    HEADER,
    HEARTBEAT_S,
    IDLE,
    LATENTS,
    MUTE,
    PATIENCE_S,
    REBUILD,
    STEP_SLACK_S,
    STUCK,
    Bench,
    Case,
    bench_for,
    matrix,
    row,
    run_case,
    undisturbed,
    verify,
)

MakeGroup = Callable[..., RankGroup]
Latents = NDArray[np.float32]
RESTART_S = 3.0
SLACK_S = 1.0  # for a machine that is busy with something else
NOTICED_S = {
    "SIGKILL": 0.0,
    "SIGSEGV": 0.0,
    "SIGSTOP": 2 * HEARTBEAT_S,
    "exception": ERROR_GRACE_S,
    "out of memory": ERROR_GRACE_S,
    "late heartbeat": STEP_SLACK_S,
    "CUDA error": 0.0,
    "TensorRT refuses": 0.0,
    STUCK: STEP_SLACK_S,
    MUTE: STEP_SLACK_S,
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench() as bench:
        yield bench


@pytest.fixture(scope="module")
def expected(bench: Bench) -> Latents:
    """The result that every request must have."""
    return bench.run()[1]


def assert_serves(group: RankGroup) -> None:
    *_, last = group.run({"do": "echo"}, {"x": np.ones(3)})
    assert last.tensors["x"].sum() == 3


def check(bench: Bench, case: Case, expected: Latents) -> None:
    outcome = run_case(bench, case)
    verify(bench, outcome, expected)
    print(row(case, outcome))
    limit_s = NOTICED_S[case.how]
    if case.how in LOST_DEVICE and case.moment == REBUILD:
        limit_s = RESTART_S  # the rank is started before it can use its GPU
    elif case.how == MUTE and case.moment in (IDLE, "first step"):
        limit_s = DEAD_BEATS * HEARTBEAT_S
    elif case.how == STUCK and case.moment == "first step":
        limit_s = FIRST_STEP_S
    if case.how == "late heartbeat" and case.moment in (IDLE, "first step", REBUILD):
        assert outcome.noticed_s is None, "it is not late by so much"
    else:
        assert outcome.noticed_s is not None
        assert outcome.noticed_s < limit_s + SLACK_S


@pytest.mark.parametrize(
    "case",
    [
        Case("SIGKILL", 0, "middle step"),
        Case("SIGSTOP", 1, "last step"),
        Case("exception", 1, "first step"),
        Case("late heartbeat", 0, IDLE),
        Case(MUTE, 1, IDLE),
        Case(STUCK, 1, "middle step"),
        Case("TensorRT refuses", 1, "middle step"),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def test_the_request_goes_on_where_it_was(bench: Bench, expected: Latents, case: Case) -> None:
    check(bench, case, expected)


def test_a_rank_alone_whose_gpu_is_lost_is_replaced() -> None:
    case = Case("CUDA error", 0, "middle step", ranks=1)
    with bench_for(case) as bench:
        expected, [pid] = bench.run()[1], bench.group.pids
        check(bench, case, expected)
        assert bench.group.generation == 2
        assert pid not in bench.group.pids
        assert bench.group.last_loss is not None
        assert bench.group.last_loss.reason == "rank 0 has lost its GPU (exit status 70)"


def test_a_gpu_that_is_lost_again_and_again_is_no_fault_of_the_caller(bench: Bench) -> None:
    fault = bench.fault("TensorRT refuses", 1, 2, generations=9)
    with pytest.raises(WorkerFailed, match=r"^The ranks failed 2 times .*: .* rank 1 has lost its GPU"):
        bench.run(max_resumes=1, fault=fault)
    bench.group.wait_ready(PATIENCE_S)  # it heals, and others count what this process has open


@pytest.mark.slow
@pytest.mark.parametrize("how", [*FAULTS, MUTE, STUCK])
def test_every_fault_at_every_moment(expected: Latents, how: str) -> None:
    results = {1: undisturbed(1), 2: expected}
    print(HEADER)
    for case in matrix():
        if case.how == how:
            with bench_for(case) as bench:
                check(bench, case, results[case.ranks])


def test_ranks_that_end_together_are_ready_for_the_next_request_at_once() -> None:
    with Bench(size=4) as bench:
        _, result = bench.run()
        pids = bench.group.pids
        for _ in range(3):
            run = bench.group.run({"steps": 1000, "start_step": 0, "timeout_s": None}, {"latents": LATENTS})
            next(run)
            run.cancel()
            with pytest.raises(RequestCancelled):
                list(run)
            assert seconds_of_a_job(bench.group) < 0.1
            late = bench.group.run({"steps": 1000, "start_step": 0, "timeout_s": 0.05}, {"latents": LATENTS})
            with pytest.raises(DeadlineExceeded):
                list(late)
            assert seconds_of_a_job(bench.group) < 0.1
        assert bench.group.pids == pids
        assert bench.run()[1].tobytes() == result.tobytes()


def seconds_of_a_job(group: RankGroup) -> float:
    """From here to the first step of the next job."""
    began_s = time.monotonic()
    run = group.run({"steps": 1, "start_step": 0, "timeout_s": None}, {"latents": LATENTS})
    assert isinstance(next(run), StepEvent)
    took_s = time.monotonic() - began_s
    list(run)
    return took_s


def test_after_too_many_failures_the_request_fails_and_the_next_one_does_not(bench: Bench, expected: Latents) -> None:
    generation = bench.group.generation
    fault = bench.fault("SIGKILL", 1, 2, generations=9)
    with pytest.raises(WorkerFailed, match=r"^The ranks failed 2 times .* at last: .* rank 1 was killed by SIGKILL"):
        bench.run(max_resumes=1, fault=fault)
    assert bench.run()[1].tobytes() == expected.tobytes()
    assert bench.group.generation == generation + 2


@pytest.mark.parametrize("error", [RequestCancelled, DeadlineExceeded])
def test_a_run_that_waits_for_the_ranks_can_end(bench: Bench, error: type[Exception]) -> None:
    bench.group.start()
    generation = bench.group.generation
    timeout_s = 1.0 if error is DeadlineExceeded else None
    run = bench.queued(fault=bench.fault("SIGKILL", 0, 3), timeout_s=timeout_s)
    events = run_on(bench.group, run, 2)
    assert len([next(events) for _ in range(3)]) == 3

    def cancel_once_lost() -> None:
        bench.until_lost(generation)
        run.cancelled.set()

    if error is RequestCancelled:
        threading.Thread(target=cancel_once_lost).start()
    with pytest.raises(error):
        next(events)
    assert not bench.group.healthy, "the start of the ranks takes longer than that"


def test_a_stopped_rank_shows_while_idle_and_is_replaced(make_group: MakeGroup) -> None:
    group = make_group(size=2, heartbeat_s=0.2)
    group.start()
    os.kill(group.pids[1], signal.SIGSTOP)
    began_s = time.monotonic()
    while group.healthy:
        assert time.monotonic() < began_s + 0.4 + SLACK_S
        time.sleep(0.01)
    group.start()
    assert group.last_loss is not None
    assert re.fullmatch(r"rank 1 gave no heartbeat for 0\.\d s, its state is T \(stopped\)", group.last_loss.reason)
    assert_serves(group)
    assert group.generation == 2


def test_a_rank_that_is_stopped_while_it_starts_is_noticed(make_group: MakeGroup, tmp_path: Path) -> None:
    group = make_group("stopped_in_generation_2", {"log": str(tmp_path / "log")}, size=2)
    with pytest.raises(WorkerFailed, match="was killed by SIGSEGV"):
        list(group.run({"do": "segfault"}, {}))
    group.start()
    assert group.generation == 3
    loss = group.last_loss
    assert loss is not None
    assert "rank 1 gave no heartbeat" in loss.reason
    assert loss.noticed_s - float((tmp_path / "log").read_text()) < 1.0 + SLACK_S


def test_a_group_that_cannot_be_rebuilt_refuses_at_once_until_it_can(make_group: MakeGroup, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    group = make_group("while_the_file_exists", {"file": str(disk)})
    group.start()
    disk.unlink()
    with pytest.raises(WorkerFailed, match="SIGSEGV"):
        list(group.run({"do": "segfault"}, {}))
    with pytest.raises(ServiceUnavailable, match="The checkpoint must be there"):
        group.run({"do": "echo"}, {})
    began_s = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="The checkpoint must be there"):
        group.run({"do": "echo"}, {})
    assert time.monotonic() < began_s + 0.05
    assert not group.healthy
    disk.touch()
    while not group.healthy:
        assert time.monotonic() < began_s + PATIENCE_S
        time.sleep(0.05)
    assert_serves(group)


OF_THE_GPU = pytest.mark.parametrize("error", ["MemoryShortage", "DeviceLost"])


@OF_THE_GPU
def test_what_a_gpu_lacks_at_a_rebuild_may_come_back_and_is_tried_again(make_group: MakeGroup, error: str) -> None:
    group = make_group("without_a_gpu", {"generations": [2, 3], "error": error}, size=2)
    group.start()
    with pytest.raises(WorkerFailed, match="SIGSEGV"):
        list(group.run({"do": "segfault"}, {}))
    assert_serves(group)
    assert group.generation == 4


@OF_THE_GPU
def test_what_a_gpu_lacks_for_good_ends_a_first_start_and_at_last_a_rebuild(make_group: MakeGroup, error: str) -> None:
    group = make_group("without_a_gpu", {"generations": [1], "error": error})
    with pytest.raises(ServiceUnavailable, match="The GPU must do what it does not: choose another layout"):
        group.start()
    again = make_group("without_a_gpu", {"generations": list(range(2, 100)), "error": error})
    again.start()
    with pytest.raises(WorkerFailed, match="SIGSEGV"):
        list(again.run({"do": "segfault"}, {}))
    with pytest.raises(ServiceUnavailable, match="The GPU must do what it does not: choose another layout"):
        again.run({"do": "echo"}, {})


def test_ranks_that_die_again_and_again_while_idle_are_not_started_all_the_time(make_group: MakeGroup) -> None:
    group = make_group()
    for _ in range(3):
        group.start()
        generation = group.generation
        os.kill(group.pids[0], signal.SIGKILL)
        while group.last_loss is None or group.last_loss.generation < generation:
            time.sleep(0.005)
    with pytest.raises(ServiceUnavailable, match="were lost at once, because rank 0 was killed by SIGKILL"):
        group.start()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_parent_that_is_killed_leaves_no_rank_in_a_collective(stopped: bool, tmp_path: Path) -> None:
    program = """
import sys
from tests.parallel.faults import LATENTS, Bench
bench = Bench()
run = bench.group.run({"steps": 10**6, "start_step": 0, "timeout_s": None}, {"latents": LATENTS})
next(run)
print(*bench.group.pids, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path)},  # it cannot clear away its bench
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        descriptors = [os.pidfd_open(pid) for pid in pids]
        if stopped:
            os.kill(pids[1], signal.SIGSTOP)
        parent.kill()
        for fd in descriptors:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            assert poll.poll(5000)
            os.close(fd)
