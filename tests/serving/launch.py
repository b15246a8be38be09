"""Starting the real server on graphs that are made when they are not there."""

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer
from stepvideo_serve.parallel.group import RankGroup
from tests.server_deaths import WatchServer

READY_S = 300.0
RANK_FACTORY = "stepvideo_serve.serving.rank_factory:build_rank"

CONFIG = """
[model]
dir = "{model}"
engines_dir = "{engines}"

[limits]
max_frames = 102
max_height = 512
max_width = 512
max_steps = 100000
max_image_bytes = 2000000

[defaults]
num_frames = 17
height = 64
width = 96
steps = 2

[card]
cfg_scale = [1.0, 9.0]

# On random weights the shipped presets evaluate every step.
[presets.rough]
rule = "adaptive"
tolerance = 100.0
dense_start = 0.01
dense_end = 0.9
longest_streak = 3

[denoiser]
max_queued = {max_queued}
max_resumes = 1
"""
# Eager torch on one thread everywhere.
EAGER = """
[model]
dir = "{model}"
engines_dir = "none"
backend = "eager"

[denoiser]
layout = "{layout}"
threads = 1

[decoder]
threads = 1
"""
MAX_QUEUED = 36  # more than the 32 threads that the server has for one model's calls of others


@dataclass(frozen=True)
class Engines:
    """A checkpoint and the graphs made from it."""

    model_dir: Path
    graphs_dir: Path


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One test session at a time builds there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def export_graphs(root: Path, model_dir: Path, graphs_dir: Path) -> Engines:
    """Brings the graphs up to date; in a process of its own, because the exporter warns and keeps memory."""
    command = [sys.executable, "-m", "export.to_onnx", "--quiet"]
    subprocess.run([*command, "--model-dir", str(model_dir), "--out", str(graphs_dir)], cwd=root, check=True)
    return Engines(model_dir, graphs_dir)


def unwatched(server: TritonServer) -> AbstractContextManager[None]:
    """For a server whose end is not a matter of tests, or is what a test is about."""
    del server
    return nullcontext()


@contextmanager
def serving(root: Path, folder: Path, config: str, watch: WatchServer = unwatched) -> Iterator[TritonServer]:
    """A server on free ports, ready, with its configuration and its log in `folder`; see tests/server_deaths.py."""
    path = folder / "serve.toml"
    path.write_text(config, encoding="utf-8")
    options = ServerOptions(root / "model_repository", config=path, log=folder / "server.log", exit_timeout_s=2)
    with TritonServer(options) as server, watch(server):
        server.wait_ready(READY_S)
        yield server


@contextmanager
def ranks(root: Path, config: Path, size: int, factory: str = RANK_FACTORY, **overrides: Any) -> Iterator[RankGroup]:
    """The ranks of `dit_denoiser` without a server, ready; `config` is a serve.toml."""
    arguments: dict[str, Any] = {
        "start_timeout_s": 120.0,
        "arena_bytes": 1 << 24,
        "threads_per_rank": 1,
        "env": {"PYTHONPATH": str(root)},
    }
    with RankGroup(factory, {"config": str(config)}, size=size, **{**arguments, **overrides}) as group:
        group.start()
        yield group
