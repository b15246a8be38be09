"""No thread dies in silence: the log has the exception, and probes are refused."""

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepvideo_serve.errors import WorkerFailed
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.scheduling.run_queue import QueuedRun, QueueListener, QueueRules, RunQueue
from stepvideo_serve.serving.mailbox import Backlog, Mailbox
from stepvideo_serve.serving.observe.thread_deaths import ThreadDeaths
from tests.scheduling.queue_doubles import new_run


@pytest.fixture
def deaths() -> Iterator[ThreadDeaths]:
    """Of this process, while a test runs."""
    hook = threading.excepthook
    yield ThreadDeaths.watched()
    threading.excepthook = hook


def planted(*_: object, **__: object) -> Any:
    raise OverflowError("planted")


def in_the_queue() -> None:
    runs = RunQueue(QueueRules(1), planted, lambda: None, lambda _: None)
    run, mailbox = new_run("r")
    runs.put(run)
    assert isinstance(mailbox.answer(), WorkerFailed)
    runs.close()


def in_its_listener() -> None:
    class Planted(QueueListener):
        def began(self, run: QueuedRun, waited_s: float) -> None:
            planted(run, waited_s)

    listener = Planted()
    runs = RunQueue(QueueRules(1), lambda _: True, lambda: None, lambda _: None, listener)
    run, mailbox = new_run("r")
    runs.put(run)
    assert isinstance(mailbox.answer(), WorkerFailed)
    runs.close()


def in_a_mailbox() -> None:
    box = Mailbox(planted, Backlog(1))
    box.start()
    box.close()
    box.fetch(Silent())
    box.join(30.0)


def in_a_timer() -> None:
    timer = threading.Timer(0.0, planted)
    timer.start()
    timer.join()


class Silent:
    finish = waiting = fail = staticmethod(lambda _: None)


@pytest.mark.parametrize("plant", [in_the_queue, in_its_listener, in_a_mailbox, in_a_timer])
def test_a_thread_that_dies_is_heard_of(
    deaths: ThreadDeaths, caplog: pytest.LogCaptureFixture, plant: Callable[[], None]
) -> None:
    assert deaths.none
    deaths.check("dit_denoiser")
    with caplog.at_level(logging.ERROR):
        plant()
    assert not deaths.none
    with pytest.raises(WorkerFailed, match=r"^dit_denoiser has lost a thread, .+ \(OverflowError\): load the model"):
        deaths.check("dit_denoiser")
    [record] = [record for record in caplog.records if record.message.startswith("thread_died: ")]
    assert record.exc_info is not None
    assert "planted" in str(record.exc_info[1])


def test_a_thread_that_ends_in_order_is_none_of_it(deaths: ThreadDeaths) -> None:
    for target in (int, sys.exit):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert deaths.none


def test_the_keeper_of_the_ranks(deaths: ThreadDeaths, monkeypatch: pytest.MonkeyPatch) -> None:
    group = RankGroup("nobody:nothing", {}, size=1, start_timeout_s=60.0, arena_bytes=4096, threads_per_rank=1)
    monkeypatch.setattr(group, "_begin", planted)
    with pytest.raises(WorkerFailed, match=r"The keeper of the ranks has failed \(OverflowError\)"):
        group.start()
    group.close()
    with pytest.raises(WorkerFailed, match=r"has lost a thread, rank-keeper \(OverflowError\)"):
        deaths.check("dit_denoiser")
