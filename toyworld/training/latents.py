"""Scenes as the DiT sees them: latents of whole clips, encoded once and kept, and the states of every prompt."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.geometry import FRAMES_PER_CHUNK
from stepvideo_serve.request import DEFAULT_NEGATIVE_PROMPT, DEFAULT_POSITIVE_SUFFIX
from stepvideo_serve.text.encode import TextEncoder
from stepvideo_serve.text.states import TextStates
from stepvideo_serve.vae.model import VideoEncoder
from toyworld.prompts import wordings
from toyworld.training.state import load_state, save_state
from toyworld.world import FRAMES, Scene, draw_scene, render

CLIPS_PER_SAVE: Final = 32
TRAIN_SEED, HELD_OUT_SEED = 10_000_000, 20_000_000
EMPTY_PROMPT: Final = DEFAULT_POSITIVE_SUFFIX  # what the text encoder gets when a request's prompt is empty


@dataclass(frozen=True)
class ClipSet:
    """Latents [n, 6, C, 4, 4] of the first n scenes of a sequence that the seed decides."""

    scenes: list[Scene]
    latents: Tensor


def scene_number(index: int, held_out: bool) -> Scene:
    """Scene `index` of the sequence for training, or of that with combinations training never sees."""
    seed = (HELD_OUT_SEED if held_out else TRAIN_SEED) + index
    return draw_scene(torch.Generator().manual_seed(seed), held_out)


@torch.no_grad()
def encode_clip(encoder: VideoEncoder, scene: Scene) -> Tensor:
    """Posterior means of a whole clip, chunk by chunk: [6, C, 4, 4]."""
    chunks = render(scene).unflatten(0, (FRAMES // FRAMES_PER_CHUNK, FRAMES_PER_CHUNK))
    return torch.cat([encoder(chunk[None])[0][0] for chunk in chunks])


def cached_clips(
    path: Path, encoder: VideoEncoder, count: int, held_out: bool, minutes: float, say: Callable[[str], None]
) -> ClipSet | None:
    """The first `count` clips, from `path` as far as they are there, else encoded and added; None when the minutes
    run out first. Raises CheckpointError when `path` is of another encoder."""
    digest = _weights_digest(encoder)
    latents: list[Tensor] = []
    if path.exists():
        tensors, header = load_state(path)
        if header["encoder"] != digest:
            raise CheckpointError(f"{path} must hold latents of this VAE's encoder, was made by another: remove it.")
        latents = list(tensors["latents"])
    began_s, known = time.monotonic(), len(latents)
    while len(latents) < count and time.monotonic() - began_s < 60 * minutes:
        latents.append(encode_clip(encoder, scene_number(len(latents), held_out)))
        if len(latents) % CLIPS_PER_SAVE == 0 or len(latents) == count:
            say(f"latents {len(latents)}/{count} {(time.monotonic() - began_s) / 60:.1f} min")
            save_state(path, {"latents": torch.stack(latents)}, encoder=digest)
    if len(latents) > known:
        save_state(path, {"latents": torch.stack(latents)}, encoder=digest)
    if len(latents) < count:
        return None
    return ClipSet([scene_number(i, held_out) for i in range(count)], torch.stack(latents[:count]))


def encode_prompts(checkpoint: Checkpoint, clips: ClipSet) -> dict[str, TextStates]:
    """States of every wording of every scene with the default suffix behind it, of the empty prompt, and of the
    default negative prompt; by prompt."""
    prompts = {text: text + DEFAULT_POSITIVE_SUFFIX for scene in clips.scenes for text in wordings(scene)}
    prompts |= {"": EMPTY_PROMPT, DEFAULT_NEGATIVE_PROMPT: DEFAULT_NEGATIVE_PROMPT}
    encoder = text_encoder(checkpoint)
    return {name: encoder.encode(text)[0] for name, text in prompts.items()}


def text_encoder(checkpoint: Checkpoint) -> TextEncoder:
    """Both text encoders in fp32."""
    step_llm, clip = checkpoint.step_llm(), checkpoint.clip()

    def llm_graph(input_ids: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"llm_states": step_llm(input_ids)}

    def clip_graph(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"clip_states": clip(input_ids, attention_mask)[0]}

    return TextEncoder(llm_graph, clip_graph, checkpoint.step_tokenizer(), checkpoint.clip_tokenizer(), 0)


def _weights_digest(encoder: VideoEncoder) -> str:
    state: Mapping[str, Tensor] = encoder.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].numpy().tobytes())
    return digest.hexdigest()
