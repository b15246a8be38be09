"""Every thread that the package starts, found in its source: an exception in one is told, wherever the thread is.

A thread belongs to one of three kinds. One that works for a model for long is heard of when it dies, which turns the
model's health false. One that works for somebody who waits hands its exception over. One of a rank ends the rank, which
its parent sees at once.
"""

import ast
import logging
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from stepvideo_serve.assembly.layer_weights import LayerWeights
from stepvideo_serve.config import TelemetryConfig
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.errors import RequestCancelled, WorkerFailed
from stepvideo_serve.launch import health
from stepvideo_serve.launch.server_log import ServerLog
from stepvideo_serve.parallel.first_contact import connect
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.pipeline.generate import Progress
from stepvideo_serve.scheduling.run_queue import QueueRules, RunQueue
from stepvideo_serve.serving.observe.thread_deaths import ThreadDeaths
from stepvideo_serve.serving.observe.traces import Tracer
from tests.scheduling.queue_doubles import Ranks, new_run
from tests.serving.observe.test_thread_deaths import deaths, in_a_mailbox, in_the_queue, planted

__all__ = ["deaths"]

PATIENCE_S = 60.0
STARTERS = ("Thread", "Timer", "ThreadPoolExecutor", "ProcessPoolExecutor", "start_new_thread")
PACKAGE = Path(__file__).parents[3] / "stepvideo_serve"

Where = tuple[str, str]
"""File below the package, and the name of the thread or of its pool; a timer gets its name later."""


def nodes_of_the_source() -> Iterator[tuple[Path, ast.AST]]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path, node


def called(node: ast.AST) -> str:
    """The last part of the name of what is called; "" where nothing is."""
    function = node.func if isinstance(node, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def threads_in_the_source() -> set[Where]:
    found = set()
    for path, node in nodes_of_the_source():
        if isinstance(node, ast.Call) and called(node) in STARTERS:
            names = [word.value for word in node.keywords if word.arg in ("name", "thread_name_prefix")]
            name = names[0].value if names and isinstance(names[0], ast.Constant) else ""
            found.add((path.relative_to(PACKAGE).as_posix(), str(name)))
    return found


def unseen_results() -> list[str]:
    """Where work is given to a pool and nobody looks at what becomes of it: a pool keeps exceptions to itself."""
    statements = ((path, node) for path, node in nodes_of_the_source() if isinstance(node, ast.Expr))
    return [f"{path}:{node.lineno}" for path, node in statements if called(node.value) == "submit"]


@pytest.fixture
def server_api(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's module, of which what dies here uses nothing."""
    name = "triton_python_backend_utils"
    if name not in sys.modules:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


class Refusing:
    """Metrics that cannot be set, an answer that cannot be sent, ranks that cannot be asked, spans that do not end."""

    generation, size = 1, 1
    set = send = shutdown = staticmethod(planted)

    def add(self, *_: object, **__: object) -> None: ...

    @property
    def healthy(self) -> bool:
        return bool(planted())


OTHERS: set[threading.Thread] = set()
"""Those that ran before the test: servers and groups of the whole session have threads of these names, too."""


@pytest.fixture(autouse=True)
def _others() -> Iterator[None]:
    OTHERS.update(threading.enumerate())
    yield
    OTHERS.clear()


def until_dead(name: str) -> None:
    """Until no thread of the test has this name."""
    deadline_s = time.monotonic() + PATIENCE_S
    while any(thread.name == name for thread in {*threading.enumerate()} - OTHERS):
        assert time.monotonic() < deadline_s, f"{name} still runs"
        time.sleep(0.01)


def the_expiry(_: pytest.MonkeyPatch) -> None:
    """Of a run that waits while another has the ranks."""
    ranks = Ranks()
    runs = RunQueue(QueueRules(1), ranks.serve, ranks.interrupt, lambda _: None)
    first, _mailbox = new_run("first")
    runs.put(first)
    ranks.next_started()
    late, mailbox = new_run("late", timeout_s=0.05)
    told = threading.Event()

    def refuse(error: BaseException) -> None:
        told.set()
        planted(error)

    mailbox.fail = refuse  # type: ignore[method-assign]
    runs.put(late)
    assert told.wait(PATIENCE_S)
    until_dead("expiry")
    ranks.turn.release()
    runs.close()


def the_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    group = RankGroup("nobody:nothing", {}, size=1, start_timeout_s=60.0, arena_bytes=4096, threads_per_rank=1)
    monkeypatch.setattr(group, "_begin", planted)
    with pytest.raises(WorkerFailed, match=r"The keeper of the ranks has failed \(OverflowError\)"):
        group.start()
    group.close()
    until_dead("rank-keeper")


def the_watch_over_the_ranks(_: pytest.MonkeyPatch) -> None:
    from stepvideo_serve.serving.observe.run_watch import RankWatch

    metrics: Any = types.SimpleNamespace(add=lambda *_, **__: None, set=lambda *_, **__: None)
    ranks: Any = Refusing()
    RankWatch(metrics, ranks).close()


def the_heartbeat_of_a_model(_: pytest.MonkeyPatch) -> None:
    from stepvideo_serve.serving.observe.metrics import Heartbeats

    metrics: Any = Refusing()
    Heartbeats(metrics, "dit_denoiser").close()


def the_heartbeat_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request fails."""
    from stepvideo_serve.serving import public

    monkeypatch.setattr(public, "HEARTBEAT_S", 0.01)
    answer: Any = Refusing()
    failed = pytest.raises(WorkerFailed, match=r"The heartbeat of the request has failed \(OverflowError\)")
    with failed, public.Heartbeat(answer, 3):
        until_dead("heartbeat")
    heartbeat = public.Heartbeat(answer, 3)
    heartbeat.__enter__()
    until_dead("heartbeat")
    with failed:
        heartbeat.send(Progress(1, 3, 0.0, None))


def the_watch_over_a_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is ended, and fails."""
    from stepvideo_serve.serving import model_calls

    ended = threading.Event()

    def answer(_model: str, inputs: dict[str, Any], *_: object) -> dict[str, Any]:
        if "CANCEL_RUN" in inputs:
            ended.set()
        if "NEXT_OF" in inputs:
            assert ended.wait(PATIENCE_S)
            raise RequestCancelled("The request was cancelled by its caller.")
        return {}

    monkeypatch.setattr(model_calls, "call", answer)
    with pytest.raises(WorkerFailed, match=r"The watch over a cancel has failed \(OverflowError\)"):
        list(model_calls.run("dit_denoiser", {}, planted))


def the_last_spans(_: pytest.MonkeyPatch) -> None:
    tracer = Tracer(TelemetryConfig(), "dit_denoiser")
    tracer._provider = Refusing()
    tracer.close()
    until_dead("last-spans")


def the_server_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's: the server goes on without a log, as docs/operations.md says of a full disk."""
    log = ServerLog(Path(os.devnull))
    monkeypatch.setattr(log, "_read", planted)
    os.write(log.write_end, b"a line\n")
    until_dead("server-log")
    with pytest.raises(BrokenPipeError):
        os.write(log.write_end, b"another\n")
    log.close()


def the_work_of_a_stage(_: pytest.MonkeyPatch) -> None:
    from stepvideo_serve.serving.stage_work import StageWork, Task

    reply: Any = types.SimpleNamespace(finish=planted, fail=planted)
    StageWork(lambda _: {}).put(Task({}, reply))
    until_dead("stage-work")


DIE: dict[Where, Callable[[pytest.MonkeyPatch], None]] = {
    ("scheduling/run_queue.py", "runs"): lambda _: in_the_queue(),
    ("scheduling/run_queue.py", ""): the_expiry,
    ("serving/mailbox.py", "mailbox"): lambda _: in_a_mailbox(),
    ("parallel/group.py", "rank-keeper"): the_keeper,
    ("serving/observe/run_watch.py", "rank-watch"): the_watch_over_the_ranks,
    ("serving/observe/metrics.py", "heartbeat-metric"): the_heartbeat_of_a_model,
    ("serving/public.py", "heartbeat"): the_heartbeat_of_a_request,
    ("serving/model_calls.py", "cancel-watch"): the_watch_over_a_cancel,
    ("serving/observe/traces.py", "last-spans"): the_last_spans,
    ("launch/server_log.py", "server-log"): the_server_log,
    ("serving/stage_work.py", "stage-work"): the_work_of_a_stage,
}
"""Threads whose death is remembered: what they do is done by nobody else."""


def the_reader_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepvideo_serve.serving import model_calls

    monkeypatch.setattr(model_calls, "call", planted)
    with pytest.raises(OverflowError, match="planted"):
        list(model_calls.run("dit_denoiser", {}, lambda: False))


def a_question(_: pytest.MonkeyPatch) -> None:
    from stepvideo_serve.serving.model_calls import in_time

    with pytest.raises(OverflowError, match="planted"):
        in_time(planted)


def the_questions_of_a_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_call", lambda *_: (200, "{}"))
    monkeypatch.setattr(health, "ask", planted)
    with pytest.raises(OverflowError, match="planted"):
        health.check("127.0.0.1:1")


def the_first_contact_of_ranks(_: pytest.MonkeyPatch) -> None:
    ranks: Any = types.SimpleNamespace(from_all=planted)
    with pytest.raises(OverflowError, match="planted"):
        connect(ranks, Layout.parse("cfg2"), 0, torch.device("cpu"))


def the_hashing_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of the process fails."""
    weights, manifest = object.__new__(LayerWeights), Manifest(checkpoint="", precision="fp32", tools={}, graphs={})
    monkeypatch.setattr(weights, "_identities", planted)
    with pytest.raises(OverflowError, match="planted"), weights.checked(manifest, (), str):
        nothing()


HAND_OVER: dict[Where, Callable[[pytest.MonkeyPatch], None]] = {
    ("serving/model_calls.py", "run-reader"): the_reader_of_a_run,
    ("serving/model_calls.py", "question"): a_question,
    ("launch/health.py", ""): the_questions_of_a_health_check,
    ("parallel/first_contact.py", "first contact"): the_first_contact_of_ranks,
    ("assembly/layer_weights.py", "hash-weights"): the_hashing_of_weights,
}
"""Threads whose exception reaches who waits for them: a request, which fails by it, a health check, or a start."""

LOG = {("serving/public.py", "request"): "request_unanswered: OverflowError"}
"""Threads of a pool, which go on: an exception is that of one request, whose answer could not be sent."""

END_THEIR_RANK = {("parallel/rank_process.py", "channel"), ("parallel/rank_process.py", "heartbeat")}


def test_every_thread_of_the_source_is_planted_here() -> None:
    assert threads_in_the_source() == DIE.keys() | HAND_OVER.keys() | LOG.keys() | END_THEIR_RANK
    assert not unseen_results()


@pytest.mark.usefixtures("server_api")
@pytest.mark.parametrize("where", DIE, ids=lambda where: where[1] or "expiry")
def test_a_thread_that_dies_turns_health_false(
    deaths: ThreadDeaths,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    where: Where,
) -> None:
    name = where[1] or "expiry"
    with caplog.at_level(logging.ERROR):
        DIE[where](monkeypatch)
    assert not deaths.none
    with pytest.raises(WorkerFailed, match=rf"^ti2v has lost a thread, {name} \(OverflowError\): load the model anew"):
        deaths.check("ti2v")
    said = [record for record in caplog.records if record.message.startswith("thread_died: ")]
    assert said
    assert all(record.exc_info is not None and "planted" in str(record.exc_info[1]) for record in said)


@pytest.mark.usefixtures("server_api")
@pytest.mark.parametrize("where", HAND_OVER, ids=lambda where: where[1] or "health")
def test_a_thread_that_somebody_waits_for_hands_its_exception_over(
    deaths: ThreadDeaths, monkeypatch: pytest.MonkeyPatch, where: Where
) -> None:
    HAND_OVER[where](monkeypatch)
    assert deaths.none


def nothing() -> None:
    """Ends well."""


@pytest.mark.usefixtures("server_api")
def test_what_escapes_a_request_is_logged(deaths: ThreadDeaths, caplog: pytest.LogCaptureFixture) -> None:
    from stepvideo_serve.serving.public import _log_what_was_lost

    with caplog.at_level(logging.ERROR), ThreadPoolExecutor(1) as pool:
        pool.submit(planted).add_done_callback(_log_what_was_lost)
        pool.submit(nothing).add_done_callback(_log_what_was_lost)
    [record] = caplog.records
    assert record.message == LOG["serving/public.py", "request"]
    assert record.exc_info is not None
    assert deaths.none


@pytest.mark.parametrize("thread", sorted(name for _, name in END_THEIR_RANK))
def test_a_thread_of_a_rank_ends_the_rank_and_the_run(
    root: Path, capfd: pytest.CaptureFixture[str], thread: str
) -> None:
    """Were its beats only missed, the words about its end would be others."""
    with RankGroup(
        "tests.serving.observe.planted_ranks:build",
        {},
        start_timeout_s=PATIENCE_S,
        arena_bytes=4096,
        threads_per_rank=1,
        env={"PYTHONPATH": str(root)},
    ) as group:
        group.start()
        with group.run({"thread": thread}, {}) as run, pytest.raises(WorkerFailed, match="rank 0 exited with status 1"):
            list(run)
        assert "OverflowError: planted" in capfd.readouterr().err
        with group.run({"thread": ""}, {}) as run:
            assert len(list(run)) == 1


def test_a_thread_without_a_plant_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import threading\nthreading.Thread(target=print, name='new').start()\nthreads.submit(print)\n"
    (tmp_path / "new.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert threads_in_the_source() == {("new.py", "new")}
    assert unseen_results() == [f"{tmp_path / 'new.py'}:3"]
