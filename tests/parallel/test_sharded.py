"""Every layout on real gloo ranks against one rank: the same latents, in eager torch and in ONNX Runtime."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from export.graphs.recipe import Recipe
from export.tiny_checkpoint import write_checkpoint
from export.to_onnx import export_graphs
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.stages import Denoiser, FrameDecoder
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.memory.sizes import ModelSize
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.planning.cost import exchanges
from stepvideo_serve.planning.model_size import ModelConfigs, model_size
from tests.mini import MINI, relative_error
from tests.parallel.sharded_ranks import LATENTS, STEPS, make_forecast_job, make_job, make_video

LAYOUTS = ("cfg2", "tp2", "tp4", "sp2", "sp4", "cfg2.tp2", "cfg2.sp2", "tp2.sp2")
RANKS = 4
HEADS = 4
LAYERS = {"eager": 3, "ort": 1}  # exporting takes time
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=["eager", "ort"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    """A checkpoint of four heads, and for ONNX Runtime its graphs cut for every layout."""
    backend = str(request.param)
    folder = tmp_path_factory.mktemp(backend)
    model, engines = folder / "model", folder / "engines"
    write_checkpoint(model, replace(MINI, dit=replace(MINI.dit, num_heads=HEADS, num_layers=LAYERS[backend])))
    for layout in ("single", *LAYOUTS) if backend == "ort" else ():
        # Not compared one by one: what they compute together is.
        recipe = Recipe("fp32", compare=False)
        export_graphs(Checkpoint(model), engines, "fp32", ["dit_*"], False, Layout.parse(layout), recipe=recipe)
    table = f'[model]\ndir = "{model}"\nengines_dir = "{engines}"\nbackend = "{backend}"\n'
    (folder / "serve.toml").write_text(f"{table}[denoiser]\nthreads = 1\n[decoder]\nthreads = 1\n")
    return ServeConfig.load(folder / "serve.toml")


@pytest.fixture(scope="module")
def results(config: ServeConfig, root: Path) -> Results:
    """What every rank of every layout computed."""
    folder = config.model.dir.parent
    (folder / "plan.json").write_text(json.dumps({"layouts": LAYOUTS, "config": str(folder / "serve.toml")}))
    command = [sys.executable, "-m", "tests.parallel.sharded_ranks"]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], cwd=root) for rank in range(RANKS)]
    try:
        assert [rank.wait(300) for rank in ranks] == [0] * RANKS
    finally:
        for rank in ranks:
            rank.kill()
    return {
        layout: [
            torch.load(folder / f"{layout}.{rank}.pt", weights_only=True)
            for rank in range(Layout.parse(layout).world_size)
        ]
        for layout in LAYOUTS
    }


@pytest.fixture(scope="module")
def alone(config: ServeConfig) -> dict[str, torch.Tensor]:
    """The latents after each step in eager torch on one rank, with and without guidance."""
    denoiser = Denoiser(replace(config, model=replace(config.model, backend="eager")))
    return {
        kind: torch.stack([done.latents for done in denoiser.run(make_job(scale)) if done.latents is not None])
        for kind, scale in (("guided", 4.0), ("alone", 1.0))
    }


@pytest.fixture(scope="module")
def frames(config: ServeConfig) -> torch.Tensor:
    """The decoded video on one rank in eager torch, uint8 [F, H, W, 3]."""
    decoder = FrameDecoder(replace(config, model=replace(config.model, backend="eager")))
    return torch.cat([torch.from_numpy(chunk) for chunk in decoder.decode(make_video())])


@pytest.fixture(scope="module")
def size(config: ServeConfig) -> ModelSize:
    """What the planner knows of the model."""
    return model_size(ModelConfigs.load(config.model.dir))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["guided", "alone"])
def test_a_layout_computes_what_one_rank_does(
    results: Results, alone: dict[str, torch.Tensor], layout: str, kind: str
) -> None:
    """One step is one velocity: its error is that of the velocity. The last latents may have gathered 1e-4."""
    expected = alone[kind]
    noise = make_job().latents
    for rank in results[layout]:
        latents = rank[kind]["latents"]
        assert latents.shape == (STEPS, *LATENTS)
        assert relative_error(latents[0] - noise, expected[0] - noise) <= 2e-5
        assert relative_error(latents[-1], expected[-1]) <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_hold_the_same_bits(results: Results, layout: str) -> None:
    first, *others = results[layout]
    for other in others:
        for kind in ("guided", "alone", "forecast"):
            assert torch.equal(other[kind]["latents"], first[kind]["latents"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_evaluate_the_same_steps(config: ServeConfig, results: Results, layout: str) -> None:
    """In and out of the guidance interval, also where the layout cannot leave out a branch."""
    denoiser = Denoiser(replace(config, model=replace(config.model, backend="eager")))
    *_, expected = denoiser.run(make_forecast_job())
    assert expected.state is not None
    assert expected.latents is not None
    assert expected.state.mask == "1100010110001011"
    for rank in results[layout]:
        assert rank["forecast"]["mask"] == expected.state.mask
        assert relative_error(rank["forecast"]["latents"], expected.latents) <= 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_sent_are_those_that_the_planner_predicts(results: Results, size: ModelSize, layout: str) -> None:
    tokens = LATENTS[0] * LATENTS[2] * LATENTS[3]
    for rank, result in enumerate(results[layout]):
        for kind, branches in (("guided", 2), ("alone", 1)):
            predicted = exchanges(size, Layout.parse(layout), tokens, branches, rank, itemsize=4)
            assert result[kind]["bytes"] == {e.collective: e.payload_bytes for e in predicted}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_decoded_on_many_ranks_are_blended_in_order(results: Results, frames: torch.Tensor, layout: str) -> None:
    leader, *others = results[layout]
    assert torch.equal(leader["frames"], frames)
    assert all(rank["frames"].numel() == 0 for rank in others)
