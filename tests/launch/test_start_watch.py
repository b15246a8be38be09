"""Starts for whose models Triton would wait for ever: they end with the reason. With the real server."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch.install import STUB
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer
from stepvideo_serve.launch.stub_processes import children_of, model_of, stubs_of
from tests.launch.test_server import MODEL, gone, members, model_repository

FAR_TOO_LONG_S = 200.0
STARVED_S = 5.0  # Triton before 25.08 gives a process up after one second
SLOW_MODEL = """
import time

class TritonPythonModel:
    def initialize(self, args):
        time.sleep(20)
"""


def starve(server: TritonServer) -> None:
    """Takes the processor from the model's process while the model is loaded, as a machine does that is overloaded."""
    models: dict[int, str] = {}
    while not (stubs := list(stubs_of(server.pid, models))):
        time.sleep(0.05)
    stub = psutil.Process(stubs[0].pid)
    time.sleep(2.0)  # until it has given its first word
    stub.suspend()
    time.sleep(STARVED_S)
    stub.resume()


def test_a_process_that_triton_has_given_up_ends_the_start(tmp_path: Path) -> None:
    options = ServerOptions(model_repository(tmp_path, SLOW_MODEL), log=tmp_path / "log", exit_timeout_s=2)
    with TritonServer(options) as server:
        thread = threading.Thread(target=starve, args=(server,))
        thread.start()
        with pytest.raises(SetupError, match="Triton must load environment, but has given its process up"):
            server.wait_ready(FAR_TOO_LONG_S)
        thread.join()
        processes = members(server)
    assert gone(processes)


def test_a_process_that_dies_without_a_word_ends_the_start(tmp_path: Path) -> None:
    """As where the interpreter of the model's process cannot be loaded: it ends before a line of the model has run."""
    repository = model_repository(tmp_path, MODEL)
    stub = repository / "environment" / STUB  # Triton takes a model's own, where there is one
    stub.write_text("#!/bin/sh\nexit 1\n", encoding="ascii")
    stub.chmod(0o755)
    options = ServerOptions(repository, log=tmp_path / "log", exit_timeout_s=2)
    with (
        TritonServer(options) as server,
        pytest.raises(SetupError, match=r"Triton must load .*, but its process has died without a word"),
    ):
        server.wait_ready(FAR_TOO_LONG_S)


def test_what_triton_runs_to_try_the_program_is_no_model() -> None:
    """Before each model it runs the program of its processes once without arguments."""
    with subprocess.Popen([STUB], executable=sys.executable, stdin=subprocess.PIPE) as tried:
        assert (tried.pid, None) in [(pid, model_of(pid, {})) for pid, _ in children_of(os.getpid())]
        assert list(stubs_of(os.getpid(), {})) == []
