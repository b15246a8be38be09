"""What the internal models refuse of whoever calls, before any work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.planning.pace import LONGEST_S, MOST_WORK, Ledger
from stepvideo_serve.request import RequestLimits
from stepvideo_serve.serving.stage_bounds import (
    CLIP_TOKENS,
    LARGEST_STATE,
    MAX_NOTE_BYTES,
    StageBounds,
    TensorBounds,
    read_note,
)
from stepvideo_serve.text import states

LIMITS = RequestLimits(max_frames=34, max_height=64, max_width=96, max_tokens=100, max_prompt_bytes=10)
BOUNDS = StageBounds(LIMITS, max_runs=4)
TENSORS = TensorBounds(channels=8, llm_width=96, clip_width=64, vocabulary=512)


def zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


def test_as_much_as_a_request_can_make_passes() -> None:
    BOUNDS.check_prompt(b"x" * 20)
    BOUNDS.check_pixels({"PIXELS": zeros(3, 64, 96), "NOISE": zeros(8, 4, 6)})
    BOUNDS.check_latents({"latents": zeros(4, 8, 4, 6)})
    BOUNDS.check_latents({"latents": zeros(6, 8, 4, 4)})


@pytest.mark.parametrize(
    ("height", "width", "noise", "words"),
    [
        (80, 96, (5, 6), "PIXELS must be at most 64x96, got 80x96"),
        (64, 112, (4, 7), "PIXELS must be at most 64x96, got 64x112"),
        (2048, 2048, (128, 128), "PIXELS must be at most 64x96, got 2048x2048"),
        (64, 96, (4, 5), "NOISE must be 4x6 for these PIXELS, got 4x5"),
        (64, 96, (4096, 4096), "NOISE must be 4x6 for these PIXELS"),
    ],
)
def test_pixels_beyond_the_limits(height: int, width: int, noise: tuple[int, int], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        BOUNDS.check_pixels({"PIXELS": zeros(3, height, width), "NOISE": zeros(1, *noise)})


def test_a_prompt_beyond_the_limits() -> None:
    with pytest.raises(InvalidRequest, match="PROMPT must be at most 20 bytes, got 21"):
        BOUNDS.check_prompt(b"x" * 21)


@pytest.mark.parametrize("shape", [(9, 8, 2, 2), (6, 8, 4, 6), (1, 8, 5, 2), (1, 8, 2, 7)])
def test_latents_beyond_the_limits(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="latents must be at most"):
        BOUNDS.check_latents({"latents": zeros(*shape)})


def just_inside() -> dict[str, np.ndarray[Any, Any]]:
    """The largest tensors of a run, with the largest values."""
    return {
        "latents": np.full((6, 8, 4, 4), np.finfo(np.float32).max),
        "condition": np.full((8, 4, 4), np.finfo(np.float32).min),
        "positive_llm": np.full((320, 96), LARGEST_STATE, np.float32),
        "positive_clip": np.full((77, 64), -LARGEST_STATE, np.float32),
        "negative_llm": zeros(1, 1),
        "negative_clip": zeros(77, 64),
        "input_ids": np.array([[0, *[511] * 319]]),
    }


def test_tensors_just_inside_the_bounds_pass() -> None:
    TENSORS.check(just_inside())
    TENSORS.check({"input_ids": np.zeros((1, 1), np.int64)})


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("input_ids", np.ones((1, 321), np.int64), "input_ids must be one row of 1 to 320 tokens, got 1x321"),
        ("input_ids", np.ones((1, 0), np.int64), "got 1x0"),
        ("input_ids", np.ones((0, 3), np.int64), "got 0x3"),
        ("input_ids", np.ones((2, 3), np.int64), "got 2x3"),
        ("input_ids", np.array([[1, 512]]), "input_ids must be from 0 to 511, got 1 to 512"),
        ("input_ids", np.array([[-1, 511]]), "input_ids must be from 0 to 511, got -1 to 511"),
        ("input_ids", np.array([[np.iinfo(np.int64).min]]), "input_ids must be from 0 to 511"),
        ("positive_llm", zeros(321, 96), "positive_llm must be from 1x1 to 320x96, got 321x96"),
        ("positive_llm", zeros(320, 97), "got 320x97"),
        ("negative_llm", zeros(0, 96), "negative_llm must be from 1x1 to 320x96, got 0x96"),
        ("positive_clip", zeros(78, 64), "positive_clip must be from 1x1 to 77x64, got 78x64"),
        ("negative_clip", zeros(77, 65), "got 77x65"),
        ("positive_llm", np.full((1, 1), 1.01 * LARGEST_STATE), "positive_llm must hold finite values of at most 1e"),
        ("positive_llm", np.full((3, 96), np.nan, np.float32), "positive_llm must hold finite values"),
        ("negative_clip", np.full((77, 64), -np.inf, np.float32), "negative_clip must hold finite values"),
        ("latents", zeros(3, 9, 2, 2), "latents must have at most 8 channels, got 9"),
        ("condition", zeros(9, 2, 2), "condition must have at most 8 channels, got 9"),
        ("condition", np.full((8, 2, 2), np.inf), "condition must be a finite tensor, got NaN or infinite values"),
        ("latents", zeros(0, 8, 2, 2), "latents must be a finite tensor, got no values"),
    ],
)
def test_tensors_just_outside_the_bounds(name: str, tensor: np.ndarray[Any, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        TENSORS.check({**just_inside(), name: tensor})


def test_the_bounds_of_tensors_follow_the_checkpoint(tiny_checkpoint: Path) -> None:
    found = Checkpoint(tiny_checkpoint)
    dit = found.dit_config
    expected = TensorBounds(dit.in_channels, dit.llm_channels, dit.clip_channels, found.llm_config.vocab_size)
    assert TensorBounds.of(tiny_checkpoint) == expected
    assert CLIP_TOKENS == states.CLIP_TOKENS


def test_the_bounds_follow_the_configuration(root: Path) -> None:
    config = ServeConfig.load(root / "serve.toml")
    bounds = StageBounds.of(config)
    assert bounds.max_runs == 4 * (1 + config.denoiser.max_queued)
    # four of the longest answers: its tokens as RGB
    assert bounds.max_unfetched_bytes == 4 * 3 * config.limits.max_tokens * 256 * 17 // 3


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"[]",
        b"null",
        b'{"text": 1}',
        b'{"text": [0, 1]}',
        b'{"text": [-1, 1]}',
        b'{"text": [1, -1]}',
        b'{"lunch": [1, 1]}',
        b'{"text": [NaN, 1]}',
        b'{"text": [1, Infinity]}',
        b'{"step": [1e15, 1e200]}',
        b'{"step": [1e200, 1]}',
        b'{"step": [1' + b"0" * 400 + b", 1]}",
        b'{"step": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b" " * (MAX_NOTE_BYTES + 1),
        b"\xff",
    ],
)
def test_a_note_that_cannot_be_true(note: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^NOTE must be"):
        read_note(note)


def test_a_note_of_every_stage_passes() -> None:
    note = {"text": [12.0, 0.5], "step": [3e16, LONGEST_S], "mp4": [MOST_WORK, 0.0]}
    assert read_note(json.dumps(note).encode()) == {name: tuple(pair) for name, pair in note.items()}


def test_no_notes_within_the_bounds_make_the_ledger_overflow() -> None:
    """Extremes in turn, at sizes that move each other's averages."""
    ledger, dice = Ledger(), np.random.default_rng(1)
    for _ in range(3000):
        work, seconds = float(10.0 ** dice.integers(0, 20)), float(dice.choice([0.0, 1e-300, 1e-9, 1.0, LONGEST_S]))
        ledger.note("step", work, seconds)
    for work, seconds in ledger.points()["step"]:
        assert 0 <= seconds <= LONGEST_S
        assert ledger.seconds("step", work) is not None
    assert np.isfinite(ledger.seconds("step", MOST_WORK) or 0.0)
