"""Ranks that die, do not start, or lose their parent: nobody waits for ever and nothing is left behind."""

import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from stepvideo_serve.errors import ServiceUnavailable, WorkerFailed
from stepvideo_serve.parallel.group import REBUILD_ATTEMPTS, RankGroup

MakeGroup = Callable[..., RankGroup]


def assert_serves(group: RankGroup) -> None:
    *_, last = group.run({"do": "echo"}, {"x": np.ones(3)})
    assert last.tensors["x"].sum() == 3


@contextmanager
def watch(pid: int) -> Iterator[Callable[[float], bool]]:
    """ended(limit_s): wait for the end of any process, not only of a child; False if it did not come."""
    fd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    yield lambda limit_s: bool(poll.poll(limit_s * 1000))
    os.close(fd)


def kill_and_wait(pid: int) -> None:
    with watch(pid) as ended:
        os.kill(pid, signal.SIGKILL)
        assert ended(10)


@pytest.mark.parametrize("victim", [0, 1])
def test_sigkill_during_a_run_is_noticed_at_once_and_the_next_run_works(make_group: MakeGroup, victim: int) -> None:
    group = make_group(size=2)
    run = group.run({"do": "until_cancelled"}, {})
    next(run)
    pids = group.pids
    with watch(pids[1 - victim]) as other_ended:
        began_s = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)
        with pytest.raises(WorkerFailed, match=f"rank {victim} was killed by SIGKILL: send it again"):
            next(run)
        assert time.monotonic() - began_s < 1.0
        assert other_ended(0), "the other rank must be gone when the error is raised"
    assert_serves(group)
    assert group.generation == 2
    assert group.info["settings"]["generation"] == 2


@pytest.mark.parametrize(("do", "how"), [("segfault", "was killed by SIGSEGV"), ("leave", "exited with status 7")])
def test_other_deaths_say_how(make_group: MakeGroup, do: str, how: str) -> None:
    group = make_group()
    with pytest.raises(WorkerFailed, match=f"rank 0 {how}"):
        list(group.run({"do": do}, {}))
    assert_serves(group)


@pytest.mark.parametrize("victim", [0, 1])
def test_death_while_idle_shows_in_healthy_and_is_repaired(make_group: MakeGroup, victim: int) -> None:
    group = make_group(size=2)
    group.start()
    before = group.pids
    kill_and_wait(before[victim])
    assert not group.healthy
    group.start()
    assert group.healthy
    assert not set(before) & set(group.pids)
    assert_serves(group)


def test_the_sentence_of_a_setup_error_reaches_the_starter(make_group: MakeGroup) -> None:
    group = make_group("broken_checkpoint", size=2)
    with pytest.raises(
        ServiceUnavailable, match=r"^The checkpoint must have 48 blocks, found 47: download it again\.$"
    ):
        group.start()
    assert group.pids == ()


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("buggy", "Rank 0 failed while it started: KeyError: 'layers'"),
        ("absent", "Rank 0 failed while it started: AttributeError: .*'absent'"),
        ("killed_while_loading", "could not be started, because rank 0 was killed by SIGKILL"),
    ],
)
def test_other_failures_to_start_are_worker_failed(make_group: MakeGroup, factory: str, sentence: str) -> None:
    group = make_group(factory)
    with pytest.raises(WorkerFailed, match=sentence):
        group.start()
    assert not group.healthy
    with pytest.raises(WorkerFailed, match=sentence):
        group.run({"do": "echo"}, {})


def test_settings_that_are_not_json_are_named(make_group: MakeGroup) -> None:
    with pytest.raises(WorkerFailed, match="TypeError: Object of type object is not JSON serializable"):
        make_group(settings={"model": object()}).start()


def test_a_start_that_takes_too_long_is_given_up(make_group: MakeGroup) -> None:
    group = make_group("never_ready", start_timeout_s=1.0)
    with pytest.raises(ServiceUnavailable, match="must be ready within 1 s, 1 of 1 were not"):
        group.start()
    assert not group.healthy


def test_a_missing_interpreter_is_named(make_group: MakeGroup) -> None:
    group = make_group(python="/nonexistent/python3")
    with pytest.raises(ServiceUnavailable, match="/nonexistent/python3"):
        group.start()


def test_ranks_outlive_the_thread_that_asked_for_them(make_group: MakeGroup) -> None:
    group = make_group()
    starter = threading.Thread(target=group.start)
    starter.start()
    starter.join()
    with watch(group.pids[0]) as ended:
        assert not ended(0.3)
    assert_serves(group)
    assert group.generation == 1


def test_closing_during_a_run_ends_both(make_group: MakeGroup) -> None:
    group = make_group()
    run = group.run({"do": "until_cancelled"}, {})
    next(run)
    with watch(group.pids[0]) as ended:
        group.close()
        assert ended(0)
    with pytest.raises(ServiceUnavailable, match="shutting down"):
        next(run)


@pytest.mark.parametrize("do", [None, "deaf"])
def test_no_rank_outlives_a_parent_that_is_killed(rank_env: dict[str, str], do: str | None) -> None:
    program = f"""
import sys
from stepvideo_serve.parallel.group import RankGroup
group = RankGroup("rank_factories:scripted", {{}}, size=2, start_timeout_s=60, arena_bytes=4096, threads_per_rank=1)
group.start()
do = {do!r}
if do is not None:
    run = group.run({{"do": do}}, {{}})
    next(run)
print(*group.pids, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **rank_env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        first, second = (int(pid) for pid in parent.stdout.readline().split())
        with watch(first) as first_ended, watch(second) as second_ended:
            parent.kill()
            assert first_ended(5)
            assert second_ended(5)


def test_the_shared_memory_has_no_name(make_group: MakeGroup) -> None:
    group = make_group()
    group.start()
    for pid in (os.getpid(), *group.pids):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "memfd:stepvideo-jobs (deleted)" in maps
        assert not [line for line in maps.splitlines() if "/dev/shm" in line and "stepvideo" in line]


def test_a_dead_rank_is_not_alive_while_another_thread_is_about_to_reap_it(make_group: MakeGroup) -> None:
    group = make_group()
    group.start()
    ranks = group._ranks
    assert ranks is not None
    lock = vars(ranks.processes[0].popen)["_waitpid_lock"]
    with lock:  # as Popen.wait holds it
        kill_and_wait(group.pids[0])
        assert not ranks.alive()
    assert_serves(group)


def test_ranks_that_served_at_once_did_not_fail_to_start(
    make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job may begin before the thread that started the ranks goes on: here, it always does."""
    begin = RankGroup._begin

    def begin_and_be_overtaken(group: RankGroup) -> object:
        before = group._job_id
        began = begin(group)
        limit_s = time.monotonic() + 10
        while group._job_id == before and time.monotonic() < limit_s:
            time.sleep(0.005)
        return began

    monkeypatch.setattr(RankGroup, "_begin", begin_and_be_overtaken)
    group = make_group()
    for _ in range(REBUILD_ATTEMPTS + 1):
        assert_serves(group)
        kill_and_wait(group.pids[0])
    assert_serves(group)


def test_20_generations_leak_no_file_descriptor_and_no_mapping(make_group: MakeGroup) -> None:
    group = make_group()
    group.start()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        kill_and_wait(group.pids[0])
        assert_serves(group)
    gc.collect()
    assert group.generation == 21
    assert len(os.listdir("/proc/self/fd")) == before
    assert Path("/proc/self/maps").read_text().count("memfd:stepvideo") == 2
    group.close()
    assert "memfd:stepvideo" not in Path("/proc/self/maps").read_text()
