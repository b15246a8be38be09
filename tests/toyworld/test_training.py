"""Tiny trainings: stopped and resumed they end with the same bits, and what is computed exactly is exact."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.request import DEFAULT_NEGATIVE_PROMPT
from stepvideo_serve.text.states import TextStates
from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.model import VideoVAE
from tests.mini import normal, relative_error
from toyworld.prompts import wordings
from toyworld.train import main
from toyworld.training.dit import DitPlan, DitTrainer
from toyworld.training.dit_setup import initialise as initialise_dit
from toyworld.training.dit_setup import stack_texts, toy_dit, velocity
from toyworld.training.latents import ClipSet, cached_clips, scene_number
from toyworld.training.official_layout import write_checkpoint
from toyworld.training.optimizer import Optimizer, orthogonal
from toyworld.training.vae import Phase, VaeTrainer, draw_clips
from toyworld.training.vae_setup import LOGVAR, PixelHead, attach_pixels, initialise, standardise

SMALL = VAEConfig(
    z_channels=8,
    num_res_blocks=1,
    encoder_stem=32,
    encoder_widths=(32, 32, 32, 32),
    decoder_widths=(64, 64, 32, 32),
)
PLAN = (
    Phase("image", 2, 1, 1e-3, 1e-3, size=32),
    Phase("clip", 2, 1, 1e-3, 1e-3, size=32),
    Phase("decoder", 2, 1, 1e-3, 1e-3, size=32),
)
TEXT = (24, 16)  # widths of LLM and CLIP states


def states_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def advance_to_the_end(trainer: VaeTrainer, stop_after: int | None = None) -> None:
    """All phases, or as many steps; then everything is on disk."""
    taken = 0
    while not trainer.done and taken != stop_after:
        trainer.advance()
        taken += 1
        trainer.end_phase_if_due()
    trainer.save()


def test_a_stopped_vae_training_goes_on_bit_identically(tmp_path: Path) -> None:
    whole = VaeTrainer(tmp_path / "whole", 3, PLAN, SMALL)
    advance_to_the_end(whole)
    for stop in (1, 3, 5):
        folder = tmp_path / str(stop)
        advance_to_the_end(VaeTrainer(folder, 3, PLAN, SMALL), stop)
        resumed = VaeTrainer(folder, 3, PLAN, SMALL)
        advance_to_the_end(resumed)
        assert states_equal(resumed.vae.state_dict(), whole.vae.state_dict()), f"stopped after {stop} steps"


def test_training_lowers_the_loss_and_keeps_the_log_variance(tmp_path: Path) -> None:
    trainer = VaeTrainer(tmp_path, 3, (Phase("image", 40, 2, 3e-3, 1e-3, size=32),), SMALL)
    losses = [trainer.advance() for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    clip, _ = draw_clips(torch.Generator().manual_seed(0), 1, 17, 32)
    with torch.no_grad():
        logvar = trainer.vae.encoder(clip)[1]
    assert (logvar - LOGVAR).abs().max() < 1e-4


@pytest.fixture
def vae() -> VideoVAE:
    vae = VideoVAE(SMALL).requires_grad_(False)
    initialise(vae, 5)
    return vae


def test_the_last_level_begins_as_the_pixel_head(vae: VideoVAE) -> None:
    head = PixelHead(SMALL).requires_grad_(False)
    latents = normal(2, 3, 8, 4, 4)
    expected = head(vae.decoder, latents)
    attach_pixels(vae.decoder, head, latents, seed=0)
    assert float((vae.decoder(latents) - expected).norm() / expected.norm()) < 0.05  # of noise instead: about 1


def test_standardised_latents_decode_to_the_same_pixels(vae: VideoVAE) -> None:
    clip, _ = draw_clips(torch.Generator().manual_seed(0), 2, 17, 64)
    latents = vae.encoder(clip)[0]
    before = vae.decoder(latents)
    standardise(vae, latents)
    scaled, logvar = vae.encoder(clip)
    deviation = scaled.transpose(1, 2).flatten(2).transpose(0, 1).flatten(1).std(dim=1)
    torch.testing.assert_close(deviation, torch.ones(8), rtol=1e-4, atol=0)
    assert relative_error(vae.decoder(scaled), before) < 1e-3
    assert (logvar - LOGVAR).abs().max() < 1e-4


def text_of(length: int, seed: int) -> TextStates:
    return TextStates(llm=normal(length, TEXT[0], seed=seed), clip=normal(77, TEXT[1], seed=seed))


def test_the_padded_batch_is_the_model_prompt_by_prompt() -> None:
    dit = toy_dit(8, *TEXT).requires_grad_(False)
    for index, parameter in enumerate(dit.parameters()):
        parameter.copy_(0.1 * normal(*parameter.shape, seed=index))
    texts = [text_of(length, seed) for seed, length in enumerate((5, 9, 7))]
    latents, at, scores = normal(3, 6, 8, 4, 4), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([2.0, 5.0, 20.0])
    condition = torch.zeros_like(latents)
    condition[:, 0] = latents[:, 0]
    expected = [
        dit(latents[i, None], condition[i, None], at[i, None], scores[i, None], text.llm[None], text.clip[None])
        for i, text in enumerate(texts)
    ]
    result = velocity(dit, latents, latents[:, 0], at, scores, stack_texts(texts))
    assert relative_error(result, torch.cat(expected)) < 2e-5


def test_a_stopped_dit_training_goes_on_bit_identically(tmp_path: Path) -> None:
    scenes = [scene_number(i, held_out=False) for i in range(4)]
    clips = ClipSet(scenes, normal(4, 6, 8, 4, 4))
    names = ["", *(text for scene in scenes for text in wordings(scene))]
    texts = {name: text_of(6 + i % 3, i) for i, name in enumerate([*names, DEFAULT_NEGATIVE_PROMPT])}

    def trainer(folder: str) -> DitTrainer:
        return DitTrainer(tmp_path / folder, 3, toy_dit(8, *TEXT), (clips, clips), texts, DitPlan(steps=4, batch=2))

    whole = trainer("whole")
    assert whole.run(minutes=5, say=print)
    half = trainer("half")
    half.advance()
    half.advance()
    half.save()
    resumed = trainer("half")
    assert resumed.step == 2
    assert resumed.run(minutes=5, say=print)
    assert states_equal(resumed.dit.state_dict(), whole.dit.state_dict())
    assert states_equal(resumed.mean.state, whole.mean.state)


def test_latents_are_encoded_once_and_belong_to_their_encoder(tmp_path: Path, vae: VideoVAE) -> None:
    path, said = tmp_path / "latents.safetensors", list[str]()
    assert cached_clips(path, vae.encoder, 2, held_out=False, minutes=0, say=said.append) is None
    first = cached_clips(path, vae.encoder, 2, held_out=False, minutes=5, say=said.append)
    assert first is not None
    assert first.latents.shape == (2, 6, 8, 4, 4)
    assert len(said) == 1
    again = cached_clips(path, vae.encoder, 2, held_out=False, minutes=5, say=said.append)
    assert again is not None
    assert torch.equal(first.latents, again.latents)
    assert len(said) == 1
    initialise(vae, 6)
    with pytest.raises(CheckpointError, match="another"):
        cached_clips(path, vae.encoder, 2, held_out=False, minutes=5, say=said.append)


def test_what_is_written_loads_as_a_checkpoint(tmp_path: Path, mini_checkpoint: Path, vae: VideoVAE) -> None:
    text_from = Checkpoint(mini_checkpoint)
    dit = toy_dit(8, text_from.llm_config.width, text_from.clip_config.hidden_size).requires_grad_(False)
    initialise_dit(dit, 1)
    out = tmp_path / "checkpoint"
    out.mkdir()
    (out / "README.md").write_text("kept", encoding="utf-8")
    for _ in range(2):  # the second time in the place of the first
        write_checkpoint(out, mini_checkpoint, vae.state_dict(), dit.state_dict(), dit.config)
    written = Checkpoint(out)
    assert written.dit_config == dit.config
    assert written.vae_config == SMALL
    decoder = written.vae_decoder()
    for name, parameter in vae.decoder.state_dict().items():
        assert torch.equal(decoder.state_dict()[name], parameter.bfloat16().float()), name
    assert written.step_llm().state_dict().keys() == text_from.step_llm().state_dict().keys()
    assert (out / "README.md").read_text(encoding="utf-8") == "kept"
    parts = {"README.md", "transformer", "vae", "step_llm", "hunyuan_clip", "scheduler", "model_index.json"}
    assert {path.name for path in out.iterdir()} == parts


def test_orthogonal_updates_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonal(normal(12, 40)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_the_optimizer_descends_on_matrices_and_vectors() -> None:
    matrix, vector = torch.nn.Parameter(normal(6, 8)), torch.nn.Parameter(normal(8))
    target = normal(6, 8, seed=1)
    optimizer = Optimizer({"matrix": matrix, "vector": vector}, plain=())
    losses = []
    for count in range(1, 200):
        loss = (matrix + vector - target).square().mean()
        loss.backward()
        optimizer.step(0.1 * (1 - count / 200), count)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 50


def test_a_damaged_state_and_a_missing_one_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vae.safetensors").write_bytes(b"nothing of use")
    with pytest.raises(CheckpointError, match=r"vae\.safetensors"):
        VaeTrainer(tmp_path, 3, PLAN, SMALL)
    monkeypatch.setattr("sys.argv", ["train", "--stage", "dit", "--out", str(tmp_path / "none")])
    assert main() == 2
    assert "run --stage vae first" in capsys.readouterr().err
