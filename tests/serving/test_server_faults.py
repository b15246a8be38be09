"""Every fault, in either rank, at every moment of a request to the real server: the request ends right all the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stepvideo_serve.parallel.job import ERROR_GRACE_S
from tests.parallel.failing import LATE_S, LOST_DEVICE
from tests.parallel.faults import FAULTS, HEARTBEAT_S, STEP_SLACK_S
from tests.server_deaths import WatchServer
from tests.serving.calls import Outputs
from tests.serving.launch import Engines
from tests.serving.server_faults import (
    HEADER,
    FaultyServer,
    expected_results,
    faulty_server,
    matrix,
    row,
    shared_memory,
    verify,
)

SLACK_S = 2.0  # for a machine that is busy with something else, and for the processes to end
RESTART_S = 6.0
LOST_WITHIN_S = {
    "SIGKILL": 2 * HEARTBEAT_S,
    "SIGSEGV": 2 * HEARTBEAT_S,
    "SIGSTOP": 2 * HEARTBEAT_S,
    "exception": ERROR_GRACE_S,
    "out of memory": ERROR_GRACE_S,
    "late heartbeat": LATE_S,  # where it is taken for stuck, and not excused as late
    "CUDA error": RESTART_S,  # where it strikes a rank that starts
    "TensorRT refuses": RESTART_S,
}


@pytest.fixture(scope="module")
def faulty(
    root: Path, engines: Engines, picture: bytes, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer
) -> Iterator[FaultyServer]:
    with faulty_server(root, tmp_path_factory.mktemp("faults"), engines, picture, watch) as faulty:
        yield faulty


@pytest.fixture(scope="module")
def alone(
    root: Path, engines: Engines, picture: bytes, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer
) -> Iterator[FaultyServer]:
    with faulty_server(root, tmp_path_factory.mktemp("alone"), engines, picture, watch, ranks=1) as faulty:
        yield faulty


@pytest.fixture(scope="module")
def expected(faulty: FaultyServer) -> dict[str, Outputs]:
    return expected_results(faulty)


@pytest.mark.slow
@pytest.mark.parametrize("how", LOST_DEVICE)
def test_a_rank_alone_that_loses_its_gpu(alone: FaultyServer, how: str) -> None:
    check(alone, expected_results(alone), how)


@pytest.mark.slow
@pytest.mark.parametrize("how", FAULTS)
def test_every_fault_at_every_moment(faulty: FaultyServer, expected: dict[str, Outputs], how: str) -> None:
    check(faulty, expected, how)


def check(faulty: FaultyServer, expected: dict[str, Outputs], how: str) -> None:
    at_start = shared_memory()
    print(HEADER)
    for case in matrix():
        if case.how != how or case.ranks != faulty.size:
            continue
        outcome = faulty.run(case)
        print(row(case, outcome))
        verify(faulty, case, outcome, expected, at_start)
        if how != "late heartbeat":
            assert outcome.lost_s is not None
        if outcome.lost_s is not None:
            longest_step_s = max(outcome.step_seconds)
            assert outcome.lost_s < max(LOST_WITHIN_S[how], longest_step_s + STEP_SLACK_S) + SLACK_S
        if case.moment in ("first step", "middle step", "last step") and outcome.lost_s is not None:
            assert outcome.ended_s > outcome.lost_s, "the request was over before its ranks were lost"
