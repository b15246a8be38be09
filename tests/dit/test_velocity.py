"""The DiT put together from its graphs gives what the whole module gives."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from export.tiny_checkpoint import write_checkpoint
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components, dit_graph_names
from stepvideo_serve.dit.velocity import DiTVelocity
from stepvideo_serve.engine.runner import EagerRunner
from stepvideo_serve.errors import EngineError
from stepvideo_serve.text.states import CLIP_TOKENS, TextStates
from tests.mini import MINI, normal, relative_error

MOTION = 5.0
LATENTS = (3, 4, 4, 6)


def text(llm_tokens: int, seed: int) -> TextStates:
    return TextStates(
        llm=2 * normal(llm_tokens, MINI.dit.llm_channels, seed=seed),
        clip=normal(CLIP_TOKENS, MINI.dit.clip_channels, seed=seed + 1),
    )


@pytest.fixture(scope="module", params=[1, 2], ids=["patch1", "patch2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("velocity")
    write_checkpoint(folder, replace(MINI, dit=replace(MINI.dit, patch_size=request.param)))
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def velocity(checkpoint: Checkpoint) -> Iterator[DiTVelocity]:
    table = components(checkpoint, "fp32")
    names = dit_graph_names(checkpoint.dit_config.num_layers)
    graphs = {name: EagerRunner(table[name].spec, table[name].load()) for name in names}
    yield DiTVelocity(graphs, checkpoint.dit_config, torch.float32)
    for graph in graphs.values():
        graph.close()


def whole(checkpoint: Checkpoint, latents: Tensor, condition: Tensor, time: float, states: TextStates) -> Tensor:
    frames = torch.zeros(1, *latents.shape)
    frames[0, 0] = condition
    scalars = torch.tensor([time]), torch.tensor([MOTION])
    with torch.inference_mode():
        velocity: Tensor = checkpoint.dit()(latents[None], frames, *scalars, states.llm[None], states.clip[None])
    return velocity[0]


def test_two_branches_equal_the_whole_module(checkpoint: Checkpoint, velocity: DiTVelocity) -> None:
    condition, texts = normal(*LATENTS[1:], seed=1), (text(11, 2), text(29, 4))
    request = velocity.prepare(LATENTS, condition, MOTION, texts)
    for step, time in enumerate((0.0, 0.6)):
        latents = normal(*LATENTS, seed=10 + step)
        branches = velocity(latents, time, request)
        assert len(branches) == 2
        for branch, states in zip(branches, texts, strict=True):
            expected = whole(checkpoint, latents, condition, time, states)
            assert branch.shape == expected.shape
            assert branch.dtype == torch.float32
            assert relative_error(branch, expected) < 1e-5
        assert relative_error(*branches) > 1e-2


def test_one_branch_is_the_first_of_two(velocity: DiTVelocity) -> None:
    condition, texts, latents = normal(*LATENTS[1:]), (text(7, 1), text(3, 5)), normal(*LATENTS, seed=9)
    one = velocity(latents, 0.4, velocity.prepare(LATENTS, condition, MOTION, texts[:1]))
    two = velocity(latents, 0.4, velocity.prepare(LATENTS, condition, MOTION, texts))
    assert len(one) == 1
    assert torch.equal(one[0], two[0])


def test_requests_do_not_disturb_each_other(velocity: DiTVelocity) -> None:
    condition, latents = normal(*LATENTS[1:]), normal(*LATENTS, seed=9)
    request = velocity.prepare(LATENTS, condition, MOTION, (text(7, 1),))
    before = velocity(latents, 0.4, request)[0]
    larger = (3, 4, 6, 8)
    other = velocity.prepare(larger, normal(*larger[1:]), 2.0, (text(20, 6),))
    velocity(normal(*larger), 0.9, other)
    assert torch.equal(velocity(latents, 0.4, request)[0], before)


def test_the_image_conditions_the_first_frame_only(checkpoint: Checkpoint, velocity: DiTVelocity) -> None:
    request = velocity.prepare(LATENTS, normal(*LATENTS[1:]), MOTION, (text(7, 1),))
    tokens_per_frame = request.grid[1] * request.grid[2]
    assert request.condition_tokens[:, :tokens_per_frame].abs().min() > 0
    assert request.condition_tokens[:, tokens_per_frame:].abs().max() == 0
    assert request.condition_tokens.shape[-1] == checkpoint.dit_config.patch_values


def test_a_text_that_is_too_long_is_refused(velocity: DiTVelocity) -> None:
    with pytest.raises(EngineError, match="llm_tokens=321 is out of range"):
        velocity.prepare(LATENTS, normal(*LATENTS[1:]), MOTION, (text(321, 1),))


def test_graph_names_are_those_of_the_table(mini_checkpoint: Path) -> None:
    checkpoint = Checkpoint(mini_checkpoint)
    table = components(checkpoint, "bf16")
    assert sorted(table) == sorted(["step_llm", "hunyuan_clip", "vae_encoder", "vae_decoder", *dit_graph_names(2)])
    for component in table.values():
        assert component.part in ("llm", "clip", "vae", "dit")
        assert checkpoint.digest(component.part, component.prefix)
