"""Evaluation sets to make clips of, and servers to make them on."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

import stepvideo_client
from stepvideo_client import cli
from stepvideo_serve.launch.server import TritonServer
from tests import signals
from tests.client.fake_server import FakeServer
from tests.evaluation.scripted import DONE, told
from tests.server_deaths import WatchServer
from tests.serving.launch import serving

Popen = subprocess.Popen[str]
Completed = subprocess.CompletedProcess[str]
PATIENCE_S = 300  # of a command on a busy machine

# Nothing is kept by REQUEST_ID: a clip that is made again is computed again.
MINI_CONFIG = """
[model]
dir = "{model}"
engines_dir = "none"
backend = "eager"

[defaults]
num_frames = 17
height = 32
width = 48
steps = 2

[presets.rough]
rule = "adaptive"
tolerance = 100.0
dense_start = 0.01
dense_end = 0.9
longest_streak = 3

[idempotency]
ttl_s = 0.0

[denoiser]
threads = 1

[decoder]
threads = 1
"""


def started_client(*arguments: object) -> Popen:
    """`python -m stepvideo_client ARGUMENTS`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(stepvideo_client.__file__).parents[1])}
    command = [sys.executable, "-m", "stepvideo_client", *map(str, arguments)]
    return signals.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def run_client(*arguments: object) -> Completed:
    """The same, to its end."""
    process = started_client(*arguments)
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return Completed(process.args, process.returncode, stdout, stderr)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A scripted server, which has defaults, tells quotes and makes every clip."""
    with FakeServer(unary=told(), script=DONE) as server:
        yield server


@pytest.fixture
def start() -> Iterator[Callable[..., Popen]]:
    """As `started_client`; what is still running at the end is killed."""
    started: list[Popen] = []

    def begin(*arguments: object) -> Popen:
        process = started_client(*arguments)
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def stepvideo(capsys: pytest.CaptureFixture[str]) -> Callable[..., Completed]:
    """The command line in this process, which saves the start of another."""

    def run(*arguments: object) -> Completed:
        words = list(map(str, arguments))
        try:
            code: Any = cli.main(words)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return Completed(words, code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def mini_server(root: Path, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer) -> Iterator[TritonServer]:
    """The real server with a checkpoint whose clips take little: 17 frames of 32x48 in 2 steps, if nothing else is
    said."""
    from export.tiny_checkpoint import write_checkpoint
    from tests.mini import MINI

    narrow = replace(MINI.vae, encoder_widths=(32, 32, 32, 32), decoder_widths=(32, 32, 32, 32))
    folder = tmp_path_factory.mktemp("mini")
    write_checkpoint(folder / "checkpoint", replace(MINI, vae=narrow))
    with serving(root, folder, MINI_CONFIG.format(model=folder / "checkpoint"), watch) as running:
        yield running


def write_picture(path: Path, height: int = 40, width: int = 60, seed: int = 0) -> Path:
    """A picture with structure; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x * y + 37 * seed) % 256], axis=-1).astype(np.uint8)
    iio.imwrite(path, rgb)
    return path


def write_pair(folder: Path, name: str, prompt: str, **picture: int) -> None:
    """NAME.png and NAME.txt."""
    write_picture(folder / f"{name}.png", **picture).with_suffix(".txt").write_text(prompt, encoding="utf-8")


@pytest.fixture
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three pairs: wide, high, square."""
    folder = tmp_path_factory.mktemp("set") / "pairs"
    write_pair(folder, "a_wide", "一只猫伸懒腰。", height=40, width=60, seed=1)
    write_pair(folder, "b_high", "A dog barks.", height=60, width=40, seed=2)
    write_pair(folder, "c_square", "旋转的球", height=50, width=50, seed=3)
    return folder
