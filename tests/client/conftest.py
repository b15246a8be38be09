"""The scripted server, and the command line run as users run it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stepvideo_client
from tests import signals
from tests.client.fake_server import FakeServer

Popen = subprocess.Popen[str]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def start_cli() -> Iterator[Callable[..., Popen]]:
    """Starts `python -m stepvideo_client ARGUMENTS`; what is still running at the end is killed."""
    started: list[Popen] = []

    def start(*arguments: object, cwd: Path | None = None) -> Popen:
        environment = {**os.environ, "PYTHONPATH": str(Path(stepvideo_client.__file__).parents[1])}
        command = [sys.executable, "-m", "stepvideo_client", *map(str, arguments)]
        process = signals.start(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def cli(start_cli: Callable[..., Popen]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m stepvideo_client ARGUMENTS` to its end."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        process = start_cli(*arguments)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file with some bytes: this client does not look inside."""
    path = tmp_path / "first.png"
    path.write_bytes(b"\x89PNG image")
    return path
