"""Ctrl-C and SIGTERM while `stepvideo batch` runs."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import signals
from tests.client.fake_server import Action, FakeServer, final, result, step
from tests.evaluation.conftest import Completed, Popen
from tests.evaluation.scripted import DONE, clips, streams

Run = Callable[..., Completed]


class OneRank:
    """A script whose first clip begins and then stops until `release`; those behind it wait in the queue."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self._first = [None]

    def script(self) -> list[Action]:
        place = step(0, 2, QUEUE_POSITION=np.array([1], np.int32))
        return [place, self._turn, step(1, 2), lambda _server, _context: self._hold(), step(2, 2), result(), final()]

    def _turn(self, _server: FakeServer, context: Any) -> None:
        if self._first:
            self._first.pop()
            return
        gone = threading.Event()
        if context.add_callback(gone.set):
            gone.wait(60)

    def _hold(self) -> None:
        self.release.wait(60)


@pytest.fixture
def under_way(
    server: FakeServer, start: Callable[..., Popen], pairs: Path, tmp_path: Path
) -> Iterator[tuple[Popen, OneRank]]:
    """A batch of three clips, one of them running and one waiting, after a first Ctrl-C that it has heard."""
    rank = OneRank()
    server.script = rank.script()
    process = start("batch", pairs, "--out", tmp_path / "out", "--url", server.url)
    deadline_s = time.monotonic() + 60
    while len(streams(server)) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    signals.interrupt(process)
    assert process.stderr is not None
    while (
        line := process.stderr.readline()
    ) != "stepvideo: 1 clips under way are finished; Ctrl-C again cancels them.\n":
        assert line, "it ended"
    yield process, rank
    rank.release.set()


def test_ctrl_c_lets_what_runs_end(
    server: FakeServer, under_way: tuple[Popen, OneRank], stepvideo: Run, pairs: Path, tmp_path: Path
) -> None:
    process, rank = under_way
    assert server.cancelled.wait(10), "the one that waits is cancelled"
    rank.release.set()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout.endswith("1 of 3 clips, 1 made now, 0 given up\n")
    assert "stopped; the same command goes on" in stderr
    assert len(clips(tmp_path / "out")) == 1
    server.script = DONE
    assert stepvideo("batch", pairs, "--out", tmp_path / "out", "--url", server.url).returncode == 0
    assert len(clips(tmp_path / "out")) == 3


@pytest.mark.parametrize("tell", [signals.interrupt, Popen.terminate], ids=["Ctrl-C", "SIGTERM"])
def test_a_second_ctrl_c_or_a_sigterm_cancels(
    under_way: tuple[Popen, OneRank], tmp_path: Path, tell: Callable[[Popen], None]
) -> None:
    process, rank = under_way
    tell(process)
    stdout, _ = process.communicate(timeout=30)
    assert not rank.release.is_set()
    assert process.returncode == 130
    assert stdout.endswith("0 of 3 clips, 0 made now, 0 given up\n")
    assert not list((tmp_path / "out" / "videos").iterdir())
