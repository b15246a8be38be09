"""The smallest checkpoint, its graphs for every layout, and engines of the stub that name them."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from export.tiny_checkpoint import write_checkpoint
from export.to_onnx import export_graphs
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.parallel.layout import Layout
from tests.engine.conftest import toy
from tests.fakes.decoder import add_decoder
from tests.fakes.engines import write_engines
from tests.fakes.machine import Machine, machine
from tests.fakes.plugin_engine import PART, add_plugin_engine
from tests.mini import MINI

BRANCHES = ("single", "sp2", "tp2")
__all__ = ["toy"]  # a fixture of its neighbour, too
CONFIG = """
[model]
dir = "{model}"
engines_dir = "{engines}"
backend = "{backend}"
device = "{device}"

[limits]
max_frames = 85
max_height = 64
max_width = 80
max_tokens = 128

[defaults]
num_frames = 17
height = 64
width = 64

[denoiser]
layout = "{layout}"
threads = 1

[decoder]
threads = 1
"""
Configured = Callable[..., Path]


@pytest.fixture
def gpu_machine() -> Iterator[Machine]:
    """A machine with one GPU, for this test."""
    with machine() as made:
        yield made


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of everything: exporting takes time."""
    folder = tmp_path_factory.mktemp("small") / "model"
    write_checkpoint(folder, replace(MINI, dit=replace(MINI.dit, num_layers=1), llm=replace(MINI.llm, num_layers=1)))
    return folder


@pytest.fixture(scope="session")
def configured(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Configured:
    """configured(layout, backend="tensorrt"): path of a serve.toml. Graphs are exported before there is a machine."""
    folder = tmp_path_factory.mktemp("graphs")
    onnx, checkpoint = folder / "onnx", Checkpoint(small_checkpoint)
    for branch in BRANCHES:
        export_graphs(checkpoint, onnx, "fp32", ["dit_*"], False, Layout.parse(branch))
    add_decoder(onnx, checkpoint)
    for branch in BRANCHES:
        write_engines(onnx, folder / f"engines-{branch}", branch)

    def make(layout: str, backend: str = "tensorrt") -> Path:
        branch = Layout.parse(layout).of_branch
        path = folder / f"{layout}-{backend}.toml"
        directory, device = (folder / f"engines-{branch}", "cuda") if backend == "tensorrt" else (onnx, "cpu")
        values = {"model": small_checkpoint, "engines": directory, "backend": backend}
        path.write_text(CONFIG.format(layout=layout, device=device, **values))
        return path

    return make


@pytest.fixture(scope="session")
def load(configured: Configured) -> Callable[..., ServeConfig]:
    """The same, loaded."""
    return lambda *arguments: ServeConfig.load(configured(*arguments))


@pytest.fixture
def tp2(load: Callable[..., ServeConfig], tmp_path: Path) -> ServeConfig:
    """A copy of the engines of two slices, with an engine that has a plugin in the root and in a slice."""
    config = load("cfg2.tp2")
    engines = tmp_path / "engines"
    shutil.copytree(config.model.engines_dir, engines)
    for folder in (engines, engines / PART):
        add_plugin_engine(folder)
    return replace(config, model=replace(config.model, engines_dir=engines))
