"""A step of more than a minute is cancelled on the real server: its ranks live, and who waits hears the truth."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.failing import SLOW_STEP_S
from tests.server_deaths import WatchServer
from tests.serving.calls import Outputs, Stream
from tests.serving.launch import Engines
from tests.serving.server_faults import FaultyServer, faulty_server, strike, wait_for

OFF_BY_S = 15.0  # of what those that wait are told, on a machine that is busy with something else

pytestmark = pytest.mark.slow


@pytest.fixture
def faulty(root: Path, engines: Engines, picture: bytes, tmp_path: Path, watch: WatchServer) -> Iterator[FaultyServer]:
    with faulty_server(root, tmp_path, engines, picture, watch) as faulty:
        yield faulty


def wait_until_it_runs(stream: Stream) -> tuple[list[tuple[float, float]], Outputs]:
    """What was told of the start, as pairs of when (time.monotonic()) and START_IN_S, and the first step's outputs."""
    told = []
    while True:
        outputs, final = stream.next(2.0 * SLOW_STEP_S)
        assert not final
        if "START_IN_S" in outputs:
            told.append((time.monotonic(), float(outputs["START_IN_S"][0])))
        if outputs.get("STEP", [0])[0] > 0:
            return told, outputs


def test_ranks_in_a_step_of_more_than_a_minute_outlive_its_cancelling(faulty: FaultyServer) -> None:
    ranks = faulty.ranks()
    other = {**faulty.denoise, "SEED": np.array([8], np.int64)}
    with faulty.server.open(faulty.denoise) as slow:
        wait_for(slow, "first step", ranks[1])
        strike(ranks[1], "slow step")  # a first step may take long; the next one as long as the first
        slow.wait_for_step(1)
        strike(ranks[1], "slow step")
        time.sleep(1.0)  # into the step
    cancelled_s = time.monotonic()
    with faulty.server.open(other) as waiting:
        told, _ = wait_until_it_runs(waiting)
        ran_s = time.monotonic()
        answer = waiting.collect()
    assert ran_s - cancelled_s > 60.0, "the step was to take longer than a minute"
    assert {rank: process.pid for rank, process in faulty.ranks().items()} == {
        rank: process.pid for rank, process in ranks.items()
    }
    assert told, "nothing was said of the start"
    for when_s, start_in_s in told:
        assert abs(when_s + start_in_s - ran_s) < OFF_BY_S, f"{start_in_s:.0f} s were {ran_s - when_s:.0f} s"
    np.testing.assert_array_equal(answer.result["LATENTS"], faulty.server.stream_result(other)["LATENTS"])
