"""What the internal models accept, whoever calls: no more than a request within [limits] makes of them.

Callers of the public models never meet these bounds, since `ti2v` refuses what is beyond the limits by name.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.geometry import FRAMES_PER_CHUNK, LATENTS_PER_CHUNK, PIXELS_PER_LATENT
from stepvideo_serve.planning.pace import LONGEST_S, MOST_WORK, WORK
from stepvideo_serve.request import RequestLimits
from stepvideo_serve.request.fields import MAX_TEXT_TOKENS
from stepvideo_serve.weights.json_file import integer, read_json_object, require_model_dir

Arrays = Mapping[str, NDArray[Any]]

MAX_RUN_ID_BYTES = 128
MAX_NOTE_BYTES = 4096
PUBLIC_MODELS = 2  # ti2v and ti2v_unary: each has as many runs as it accepts requests
ANSWERS_KEPT = 4  # of the largest size: one is made while others are fetched
CLIP_TOKENS = 77  # as in text/states.py, which needs torch
LARGEST_STATE = 1e15  # of the values of text states: the squares of a state's values must sum up in fp32


@dataclass(frozen=True)
class StageBounds:
    """The bounds of one server, from its configuration."""

    limits: RequestLimits
    max_runs: int
    """Runs of one model that are known at one time: waiting, under way, or with answers that nobody has fetched."""

    @classmethod
    def of(cls, config: ServeConfig) -> "StageBounds":
        return cls(config.limits, 2 * PUBLIC_MODELS * (1 + config.denoiser.max_queued))

    @property
    def max_unfetched_bytes(self) -> int:
        """Bound of the answers of one model that wait to be fetched, together."""
        pixels = self.limits.max_tokens * PIXELS_PER_LATENT**2 * FRAMES_PER_CHUNK // LATENTS_PER_CHUNK
        return ANSWERS_KEPT * 3 * pixels

    @property
    def _max_latent_frames(self) -> int:
        return max(self.limits.max_frames // FRAMES_PER_CHUNK, 1) * LATENTS_PER_CHUNK

    def check_prompt(self, prompt: bytes) -> None:
        """Raises InvalidRequest for more bytes than a prompt and a suffix may have."""
        most = 2 * self.limits.max_prompt_bytes
        if len(prompt) > most:
            raise InvalidRequest(f"PROMPT must be at most {most} bytes, got {len(prompt)}: shorten it.")

    def check_pixels(self, inputs: Arrays) -> None:
        """Raises InvalidRequest for PIXELS beyond the limits, or NOISE that does not fit them."""
        _, height, width = inputs["PIXELS"].shape
        rows, columns = self._check_size("PIXELS", height, width, PIXELS_PER_LATENT)
        if inputs["NOISE"].shape[1:] != (rows, columns):
            found = "x".join(map(str, inputs["NOISE"].shape[1:]))
            raise InvalidRequest(f"NOISE must be {rows}x{columns} for these PIXELS, got {found}: correct it.")

    def check_latents(self, inputs: Arrays) -> None:
        """Raises InvalidRequest for latents of more frames, rows, columns or tokens than the limits allow."""
        frames, _, height, width = inputs["latents"].shape
        self._check_size("latents", height, width, 1)
        if frames > self._max_latent_frames or frames * height * width > self.limits.max_tokens:
            raise InvalidRequest(
                f"latents must be at most {self._max_latent_frames} frames and {self.limits.max_tokens} tokens, got "
                f"{frames} and {frames * height * width}: ask for less."
            )

    def _check_size(self, name: str, height: int, width: int, step: int) -> tuple[int, int]:
        """Rows and columns of the latent."""
        most = tuple(side // PIXELS_PER_LATENT * step for side in (self.limits.max_height, self.limits.max_width))
        if height > most[0] or width > most[1]:
            raise InvalidRequest(f"{name} must be at most {most[0]}x{most[1]}, got {height}x{width}: ask for less.")
        return height // step, width // step


@dataclass(frozen=True)
class TensorBounds:
    """What the tensors of a run may be, from the configuration files of the checkpoint.

    channels               of a latent
    llm_width, clip_width  of the text states
    vocabulary             of Step-LLM
    """

    channels: int
    llm_width: int
    clip_width: int
    vocabulary: int

    @classmethod
    def of(cls, model_dir: Path) -> "TensorBounds":
        """Raises CheckpointError."""
        require_model_dir(model_dir)
        dit, llm = DiTConfig.load(model_dir / "transformer" / "config.json"), model_dir / "step_llm" / "config.json"
        vocabulary = integer(read_json_object(llm), "padded_vocab_size", str(llm))
        return cls(dit.in_channels, dit.llm_channels, dit.clip_channels, vocabulary)

    def check(self, tensors: Arrays) -> None:
        """Raises InvalidRequest for a tensor of a run that is too large for this checkpoint, or whose values are not
        finite, or out of range."""
        for name, tensor in tensors.items():
            if name == "input_ids":
                self._check_ids(tensor)
            elif name.endswith(("_llm", "_clip")):
                self._check_states(name, tensor)
            else:
                self.check_latent(name, tensor)

    def check_latent(self, name: str, tensor: NDArray[Any]) -> None:
        """Raises InvalidRequest unless the tensor [..., C, h, w] has values, at most `channels` of them to a cell, and
        all finite."""
        channels = tensor.shape[-3]
        if channels > self.channels:
            raise InvalidRequest(f"{name} must have at most {self.channels} channels, got {channels}: correct it.")
        if not tensor.size or not np.isfinite(tensor).all():
            raise InvalidRequest(
                f"{name} must be a finite tensor, got {'NaN or infinite' if tensor.size else 'no'} values: correct it."
            )

    def _check_ids(self, ids: NDArray[Any]) -> None:
        rows, length = ids.shape
        if rows != 1 or not 1 <= length <= MAX_TEXT_TOKENS:
            raise InvalidRequest(
                f"input_ids must be one row of 1 to {MAX_TEXT_TOKENS} tokens, got {rows}x{length}: call ti2v instead."
            )
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise InvalidRequest(
                f"input_ids must be from 0 to {self.vocabulary - 1}, got {ids.min()} to {ids.max()}: call ti2v instead."
            )

    def _check_states(self, name: str, states: NDArray[Any]) -> None:
        length, width = states.shape
        llm = name.endswith("_llm")
        most = (MAX_TEXT_TOKENS, self.llm_width) if llm else (CLIP_TOKENS, self.clip_width)
        if not 1 <= length <= most[0] or not 1 <= width <= most[1]:
            raise InvalidRequest(
                f"{name} must be from 1x1 to {most[0]}x{most[1]}, got {length}x{width}: call ti2v instead."
            )
        if not (np.abs(states) <= LARGEST_STATE).all():
            raise InvalidRequest(
                f"{name} must hold finite values of at most {LARGEST_STATE:g}, got others: call ti2v instead."
            )


def read_note(note: bytes) -> dict[str, tuple[float, float]]:
    """{stage: (work, seconds)}. Raises InvalidRequest unless every stage is one, and every number finite and such as a
    stage can have taken."""
    if len(note) > MAX_NOTE_BYTES:
        raise InvalidRequest(f"NOTE must be at most {MAX_NOTE_BYTES} bytes, got {len(note)}: shorten it.")
    try:
        found = json.loads(note)
        pairs = {stage: (float(work), float(seconds)) for stage, (work, seconds) in found.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidRequest(f"NOTE must be a JSON object of [work, seconds] by stage: {error}.") from None
    for stage, (work, seconds) in pairs.items():
        if (
            stage not in WORK
            or not math.isfinite(work + seconds)
            or not (0 < work <= MOST_WORK and 0 <= seconds <= LONGEST_S)
        ):
            raise InvalidRequest(
                f"NOTE must be a JSON object of [work, seconds] by stage, work up to {MOST_WORK:g} and seconds up to "
                f"{LONGEST_S:g}, got {work:g} and {seconds:g} of {stage[:40]!r}: correct it."
            )
    return pairs
