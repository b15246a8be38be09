"""The server's log: nothing that was said is lost, and a failed start ends with what to correct."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer, serve_main
from stepvideo_serve.launch.server_log import ServerLog
from tests.launch.test_server import MODEL, READY_S, model_repository

CONFIG = """
[model]
dir = "{model}"
engines_dir = "none"
backend = "{backend}"
device = "{device}"
"""


@contextmanager
def logging_to(path: Path) -> Iterator[int]:
    """The end of the pipe that a server would write to."""
    log = ServerLog(path)
    with os.fdopen(os.dup(log.write_end), "wb", buffering=0) as pipe:
        log.started()
        yield pipe.fileno()
    log.close()


def wait_for(path: Path, text: bytes) -> None:
    for _ in range(500):
        if path.exists() and text in path.read_bytes():
            return
        os.sched_yield()
        subprocess.run(["sleep", "0.01"], check=True)
    raise AssertionError(f"{text!r} never came to {path}")


def test_a_log_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log"
    for words in (b"last words of the first\n", b"the second\n"):
        with logging_to(path) as pipe:
            os.write(pipe, words)
    assert path.read_bytes() == b"last words of the first\nthe second\n"


def test_a_log_that_is_moved_away_is_opened_anew(tmp_path: Path) -> None:
    path, old = tmp_path / "log", tmp_path / "log.1"
    with logging_to(path) as pipe:
        os.write(pipe, b"before\n")
        wait_for(path, b"before")
        path.rename(old)
        os.write(pipe, b"after\n")
        wait_for(path, b"after")
    assert (old.read_bytes(), path.read_bytes()) == (b"before\n", b"after\n")


def test_a_log_that_is_copied_and_truncated_has_no_hole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with logging_to(path) as pipe:
        os.write(pipe, b"before\n")
        wait_for(path, b"before")
        os.truncate(path, 0)
        os.write(pipe, b"after\n")
    assert path.read_bytes() == b"after\n"


def test_a_full_disk_keeps_nobody_waiting() -> None:
    with logging_to(Path("/dev/full")) as pipe:
        for _ in range(64):  # more than a pipe holds
            os.write(pipe, b"x" * 4096)


def test_a_log_that_cannot_be_opened_is_one_sentence(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "log"):
        assert serve_main([f"--model-repository={root / 'model_repository'}", f"--log={path}", "--http-port=0"]) == 1
        assert capsys.readouterr().err.startswith(
            f"error: The log must be a file that can be written to, {path} is not"
        )


def test_a_server_started_again_keeps_the_last_words_of_the_one_before(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ServerOptions(model_repository(tmp_path, MODEL), log=log, exit_timeout_s=2)
    server = TritonServer(options)
    for run in (1, 2):
        with server:
            server.wait_ready(READY_S)
        assert log.read_text(encoding="utf-8").count("Started GRPCInferenceService") == run
        server = server.same_again()


def test_a_server_that_is_too_slow_says_what_still_loads(tmp_path: Path) -> None:
    source = "class TritonPythonModel:\n    def initialize(self, args):\n        import time\n        time.sleep(9)\n"
    log = tmp_path / "log"
    slow = TritonServer(ServerOptions(model_repository(tmp_path, source), log=log, exit_timeout_s=2))
    with slow, pytest.raises(SetupError, match=r"in 3 s, but it did not, environment of its models still loading"):
        slow.wait_ready(3.0)


@pytest.mark.parametrize(
    ("backend", "device", "path", "sentence"),
    [
        ("eager", "cpu", "", "The model directory {missing} must exist, found no such folder."),
        ("ort", "cpu", "", "An engine directory needs {missing}/manifest.json"),
        ("eager", "cuda", "", 'device = "cuda" needs a GPU for each rank, found 0'),
        ("eager", "cpu", "numpy", "ImportError: numpy of another Python"),
    ],
)
def test_a_failed_start_ends_with_what_to_correct(
    root: Path, tiny_checkpoint: Path, tmp_path: Path, backend: str, device: str, path: str, sentence: str
) -> None:
    """On standard error, where the log goes too, from the command that a container runs."""
    shutil.copytree(root / "model_repository" / "dit_denoiser", tmp_path / "models" / "dit_denoiser")
    if path:
        (tmp_path / "site" / path).mkdir(parents=True)
        (tmp_path / "site" / path / "__init__.py").write_text(f"raise ImportError('{path} of another Python')\n")
    missing = tmp_path / "none"
    model = missing if "model directory" in sentence else tiny_checkpoint
    config = tmp_path / "serve.toml"
    config.write_text(CONFIG.format(model=model, backend=backend, device=device), encoding="utf-8")
    line = [sys.executable, "-m", "stepvideo_serve", "supervise", f"--model-repository={tmp_path / 'models'}"]
    done = subprocess.run(
        [*line, f"--config={config}", "--grpc-port=0", "--http-port=0", "--metrics-port=0"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, last[:7]) == (1, "error: "), done.stderr[-2000:]
    assert sentence.format(missing=missing) in last
    assert "Traceback" not in last
