"""Graphs that layers and ranks share compute the bits of graphs with their weights inside, in ONNX Runtime."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from export.graphs.example_inputs import LARGE_SIZES, sample_inputs
from export.graphs.recipe import CONSTANT, INPUT, Recipe
from export.to_onnx import export_graphs
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.runners import load_runners
from stepvideo_serve.assembly.stages import Denoiser
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import EngineError
from stepvideo_serve.parallel.layout import Layout
from tests.parallel.sharded_ranks import make_job

LAYOUT = "cfg2.tp2"
KINDS = (CONSTANT, INPUT)
Configure = Callable[[str], dict[str, Path]]


@pytest.fixture(scope="module")
def configure(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """Exports for a layout, once, with constants and with inputs; the configurations that serve them."""
    folder = tmp_path_factory.mktemp("shared")

    @cache
    def make(layout: str) -> dict[str, Path]:
        found = {}
        for weights in KINDS:
            place = folder / f"{layout}-{weights}"
            only = ["dit_*", "step_llm*"] if layout == "single" else ["dit_*"]
            recipe = Recipe("fp32", compare=weights == INPUT, weights=weights)
            export_graphs(
                Checkpoint(mini_checkpoint),
                place,
                only=only,
                show_progress=False,
                layout=Layout.parse(layout),
                recipe=recipe,
            )
            model = f'[model]\ndir = "{mini_checkpoint}"\nengines_dir = "{place}"\n'
            path = place / "serve.toml"
            path.write_text(f'{model}[denoiser]\nthreads = 1\nlayout = "{layout}"\n[decoder]\nthreads = 1\n')
            found[weights] = path
        return found

    return make


def of_ranks(config: Path, root: Path) -> list[dict[str, Any]]:
    """What each of four gloo ranks computed."""
    folder = config.parent / "ranks"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps({"layouts": [LAYOUT], "config": str(config)}))
    command = [sys.executable, "-m", "tests.parallel.sharded_ranks"]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], cwd=root) for rank in range(4)]
    try:
        assert [rank.wait(300) for rank in ranks] == [0] * 4
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"{LAYOUT}.{rank}.pt", weights_only=True) for rank in range(4)]


def test_one_rank(configure: Configure) -> None:
    configs = configure("single")
    steps = [
        [done.latents for done in Denoiser(ServeConfig.load(configs[weights])).run(make_job())] for weights in KINDS
    ]
    for constant, shared in zip(*steps, strict=True):
        assert constant is not None
        assert shared is not None
        assert torch.equal(constant, shared)


@pytest.mark.slow
def test_ranks_with_slices(configure: Configure, root: Path) -> None:
    configs = configure(LAYOUT)
    constant, shared = (of_ranks(configs[weights], root) for weights in KINDS)
    for before, after in zip(constant, shared, strict=True):
        for kind in ("guided", "alone", "forecast"):
            assert torch.equal(before[kind]["latents"], after[kind]["latents"])


def test_step_llm_runs_layer_by_layer_under_its_name(configure: Configure) -> None:
    """Whoever asks for the whole does not see the layers."""
    found = []
    for weights in KINDS:
        runner = load_runners(ServeConfig.load(configure("single")[weights]), ("step_llm",), 1)["step_llm"]
        with runner:
            found.append(runner(**sample_inputs(runner.spec, LARGE_SIZES))["llm_states"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_graphs_of_another_layout_are_refused(configure: Configure, tmp_path: Path) -> None:
    text = configure(LAYOUT)[INPUT].read_text().replace(f'layout = "{LAYOUT}"', 'layout = "single"')
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(EngineError, match="must hold a slice for one of 1 ranks, found one for one of 2"):
        load_runners(ServeConfig.load(tmp_path / "serve.toml"), ["dit_cross_00"], 1)
