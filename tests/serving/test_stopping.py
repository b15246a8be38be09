"""Requests of a real server that is told to stop: by SIGTERM to the container's entry point and to `serve`."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from stepvideo_serve.launch.health import check
from stepvideo_serve.launch.leftovers import SHARED_MEMORY
from stepvideo_serve.launch.server import EXIT_MARGIN_S, TRITON_EXIT_S
from tests.serving.calls import PATIENCE_S, Refused, Server, Values, until
from tests.serving.slow_line import SlowLine
from tests.signals import interrupt, start

READY = re.compile(r"ready: gRPC (\S+), HTTP (\S+), ")
PORTS = ("--grpc-port=0", "--http-port=0", "--metrics-port=0", "--ready-timeout=150")
LONG_ENOUGH_S = 300
SERVE = (sys.executable, "-m", "stepvideo_serve", "serve")
LARGE = {
    "NUM_FRAMES": np.array([102], np.int32),
    "HEIGHT": np.array([128], np.int32),
    "WIDTH": np.array([128], np.int32),
}
BEGUN_BYTES = 100_000  # more than progress and headers take


@contextmanager
def launched(
    root: Path,
    folder: Path,
    config_text: str,
    *arguments: str,
    command: tuple[str, ...] = SERVE,
    **options: Any,
) -> Iterator[tuple[subprocess.Popen[str], Server]]:
    """The launcher and its server, ready. `command` begins the command line; `options` are those of Popen."""
    config = folder / "serve.toml"
    config.write_text(config_text, encoding="utf-8")
    env = {**os.environ, "STEPVIDEO_PYTHON": sys.executable, "STEPVIDEO_SUPERVISE": "1", "TMPDIR": str(folder)}
    env["STEPVIDEO_CONFIG"] = str(config)
    line = [*command, *([f"--config={config}"] if command[-1] == SERVE[-1] else []), f"--log={folder / 'log'}", *PORTS]
    with start([*line, *arguments], cwd=root, env=env, stdout=subprocess.PIPE, **options) as process:
        try:
            assert process.stdout is not None
            ready = READY.match(process.stdout.readline())
            assert ready is not None, (folder / "log").read_text(encoding="utf-8")[-3000:]
            [pid] = [child.pid for child in psutil.Process(process.pid).children() if child.name() == "tritonserver"]
            yield process, Server(ready[1], ready[2], pid)
        finally:
            process.kill()


def with_steps(values: Values, steps: int, seed: int) -> Values:
    return {**values, "STEPS": np.array([steps], np.int32), "SEED": np.array([seed], np.int64)}


def assert_nothing_left(folder: Path, process: subprocess.Popen[str]) -> None:
    """No shared memory and no temporary folder of this launcher."""
    assert not list(SHARED_MEMORY.glob(f"stepvideo_{process.pid}_*"))
    assert not list(folder.glob("stepvideo_*"))


def test_requests_under_way_and_waiting_end_and_new_ones_are_refused_at_once(
    root: Path, config_text: str, small: Values, tmp_path: Path
) -> None:
    entry_point = (str(root / "docker" / "entrypoint.sh"),)
    arguments = (f"--exit-timeout={LONG_ENOUGH_S}",)
    with launched(root, tmp_path, config_text, *arguments, command=entry_point) as (process, server):
        probe = server.grpc_call(with_steps({**small, "OUTPUT": b"mp4"}, 20, 3))
        with server.open(with_steps(small, 1000, 1)) as running:
            # Only a run under way keeps the next from passing it: requests opened together arrive in any order.
            running.wait_for_step(10)
            with server.open(with_steps(small, 20, 2)) as waiting, probe as unary:
                until(lambda: server.waiting() == 2, "the others to wait")
                process.send_signal(signal.SIGTERM)
                until(lambda: not check(server.http_url, "ready", 30.0).well, "the probe to turn false")
                health = check(server.http_url, "ready", 30.0)
                assert "the server is shutting down, and 3 requests are still to be answered" in health.sentence
                assert check(server.http_url, "live", 30.0).well
                for ask in (server.stream_result, server.grpc, server.http):
                    began_s = time.monotonic()
                    with pytest.raises(Refused, match="UNAVAILABLE: The server is shutting down: send") as refused:
                        ask(small)
                    assert time.monotonic() - began_s < PATIENCE_S / 10
                    assert refused.value.status in (None, "UNAVAILABLE", "503")
                assert running.collect().result["SEED"][0] == 1
                assert waiting.collect().result["SEED"][0] == 2
                assert unary.result(PATIENCE_S).outputs
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert_nothing_left(tmp_path, process)


@pytest.mark.slow
def test_a_slow_line_has_the_time_too(root: Path, config_text: str, small: Values, tmp_path: Path) -> None:
    """Answers that are given, and still on their way to their callers, are requests under way."""
    large: Values = {**small, **LARGE, "OUTPUT": b"frames"}
    with launched(root, tmp_path, config_text, f"--exit-timeout={LONG_ENOUGH_S}") as (process, server):
        with SlowLine(server.grpc_url) as grpc_line, SlowLine(server.http_url) as http_line:
            slow = Server(grpc_line.url, http_line.url, server.pid)
            with ThreadPoolExecutor(2) as callers:
                answers = [callers.submit(ask, large) for ask in (slow.stream_result, slow.http)]
                until(lambda: min(grpc_line.passed_bytes, http_line.passed_bytes) > BEGUN_BYTES, "both answers")
                began_s = time.monotonic()
                process.send_signal(signal.SIGTERM)
                until(lambda: not check(server.http_url, "ready", 30.0).well, "the server to let go")
                frames = [answer.result(PATIENCE_S)["FRAMES"] for answer in answers]
            took_s = time.monotonic() - began_s
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert took_s > TRITON_EXIT_S + EXIT_MARGIN_S, "Triton alone would have had the time"
    assert frames[0].shape == (102, 128, 128, 3)
    np.testing.assert_array_equal(frames[0], frames[1])
    assert_nothing_left(tmp_path, process)


def test_a_terminal_that_is_closed_lets_the_requests_end(
    root: Path, config_text: str, small: Values, tmp_path: Path
) -> None:
    """SIGHUP from the kernel, with standard error gone: as where a connection to the machine is lost."""
    master, slave = os.openpty()
    terminal: dict[str, Any] = {"command": ("setsid", "--ctty", *SERVE), "stdin": slave, "stderr": slave}
    with ExitStack() as ends:
        ends.callback(os.close, slave)
        terminal_end = ends.enter_context(os.fdopen(master, "rb", buffering=0))
        arguments = f"--exit-timeout={LONG_ENOUGH_S}"
        with launched(root, tmp_path, config_text, arguments, **terminal) as (process, server):
            with server.open(with_steps(small, 200, 1)) as running:
                running.wait_for_step(10)
                terminal_end.close()
                until(lambda: not check(server.http_url, "ready", 30.0).well, "the server to let go")
                with pytest.raises(Refused, match="UNAVAILABLE: The server is shutting down"):
                    server.grpc(small)
                assert running.collect().result["SEED"][0] == 1
            assert process.wait(PATIENCE_S) == 128 + signal.SIGHUP
    assert_nothing_left(tmp_path, process)


def test_what_is_not_done_in_time_is_unavailable_never_internal(
    root: Path, config_text: str, long: Values, tmp_path: Path
) -> None:
    with launched(root, tmp_path, config_text, "--exit-timeout=2") as (process, server), server.open(long) as stream:
        stream.wait_for_step(2)
        began_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(Refused, match="None: UNAVAILABLE: The server is shutting down: send"):
            stream.collect()
        assert time.monotonic() - began_s > 2.0, "it had no time"
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert_nothing_left(tmp_path, process)


def test_a_second_signal_stops_at_once(root: Path, config_text: str, long: Values, tmp_path: Path) -> None:
    arguments = f"--exit-timeout={LONG_ENOUGH_S}"
    with launched(root, tmp_path, config_text, arguments) as (process, server), server.open(long) as stream:
        stream.wait_for_step(2)
        interrupt(process)
        until(lambda: not check(server.http_url, "ready", 30.0).well, "the server to let go")
        interrupt(process)
        with pytest.raises(Refused, match="UNAVAILABLE: The server is shutting down"):
            stream.collect()
        assert process.wait(TRITON_EXIT_S + EXIT_MARGIN_S + PATIENCE_S / 10) == 130
    assert_nothing_left(tmp_path, process)


# Triton gives its models a module of its own; what is asked here does not use it.
ASK_THE_MODELS = """
import os, sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
from stepvideo_serve.launch.stopping import LauncherFolder, StopSign
from stepvideo_serve.serving.observe.thread_deaths import ThreadDeaths
from stepvideo_serve.serving.public import StreamingModel, UnaryModel

folder = LauncherFolder("stepvideo_1_0")
folder.make()
os.environ.update(folder.environment)
models = [StreamingModel(), UnaryModel()]
for model in models:
    model.stop_sign, model.deaths = StopSign.from_environment(), ThreadDeaths()
print([model.is_ready() for model in models])
folder.raise_sign()
print([model.is_ready() for model in models])
folder.remove()
"""


def test_the_public_models_are_not_ready_once_the_sign_is_raised(root: Path, tmp_path: Path) -> None:
    """What servers from 26.03 on ask; the server of the wheel does not."""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ASK_THE_MODELS], cwd=root, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["[True, True]", "[False, False]"], done.stderr
    assert not list(tmp_path.iterdir())
