"""A checkpoint that a test may break, and a configuration of it."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stepvideo_serve.doctor.command import Row, examine
from stepvideo_serve.launch.options import ServerOptions

CONFIG = """
[model]
dir = "{model}"
engines_dir = "{engines}"
backend = "{backend}"
"""
Examined = Callable[..., dict[str, list[Row]]]
Doctor = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def model(mini_checkpoint: Path, tmp_path: Path) -> Path:
    """A whole checkpoint, in several shards."""
    folder = tmp_path / "model"
    shutil.copytree(mini_checkpoint, folder)
    return folder


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    """Without graphs."""
    path = tmp_path / "serve.toml"
    path.write_text(CONFIG.format(model=model, engines=tmp_path, backend="eager"), encoding="utf-8")
    return path


@pytest.fixture
def options(root: Path) -> ServerOptions:
    """Any free ports."""
    return ServerOptions(root / "model_repository")


@pytest.fixture
def examined(config: Path, options: ServerOptions) -> Examined:
    """The rows by check, in this process."""

    def look(path: Path = config, how: ServerOptions = options, **environ: str) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in examine(path, how, environ):
            found.setdefault(row.check, []).append(row)
        return found

    return look


@pytest.fixture
def doctor(root: Path, config: Path) -> Doctor:
    """The command, with `before` in front of it (such as taskset)."""

    def run(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        free = [word for port in ("grpc", "http", "metrics") for word in (f"--{port}-port", "0")]
        line = [*before, sys.executable, "-m", "stepvideo_serve", "doctor", "--config", str(config), *free, *arguments]
        return subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)

    return run
