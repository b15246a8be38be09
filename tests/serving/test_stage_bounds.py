"""What the internal models refuse of whoever calls, before any work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.planning.pace import LONGEST_S, MOST_WORK, Ledger
from stepvideo_serve.request import RequestLimits
from stepvideo_serve.serving.stage_bounds import MAX_NOTE_BYTES, StageBounds, read_note

LIMITS = RequestLimits(max_frames=34, max_height=64, max_width=96, max_tokens=100, max_prompt_bytes=10)
BOUNDS = StageBounds(LIMITS, max_runs=4)


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
