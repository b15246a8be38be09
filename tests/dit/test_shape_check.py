"""Requests that no graph takes, refused before any graph has run."""

import pytest
import torch

from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.graphs import context_spec, cross_spec, embed_spec
from stepvideo_serve.dit.segments import core_spec
from stepvideo_serve.dit.shape_check import check_shapes
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import EngineError
from stepvideo_serve.text.states import CLIP_TOKENS, TextStates

CONFIG = DiTConfig(
    num_heads=4, num_layers=1, in_channels=4, out_channels=4, patch_size=2, llm_channels=48, clip_channels=32
)
SHAPE = (3, 4, 4, 6)  # 18 tokens
Shape = tuple[int, ...]


def specs() -> dict[str, EngineSpec]:
    made = (context_spec(CONFIG, "float32"), cross_spec(CONFIG, "float32", 0), embed_spec(CONFIG, "float32"))
    return {spec.name: spec for spec in (*made, core_spec("float32", 2))}


def text(tokens: int = 5, llm_channels: int = 48, clip_tokens: int = CLIP_TOKENS) -> TextStates:
    return TextStates(torch.zeros(tokens, llm_channels), torch.zeros(clip_tokens, 32))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_what_fits(parts: int) -> None:
    check_shapes(specs(), CONFIG, SHAPE, [text(), text(320)], parts)


@pytest.mark.parametrize(
    ("shape", "texts", "parts", "words"),
    [
        ((3, 5, 4, 6), [text()], 1, 'dit_embed: input "latent_tokens"'),
        ((3, 4, 3, 6), [text()], 1, "multiples of 2, got 3 and 6"),
        ((1, 4, 2, 4), [text()], 1, "tokens=2 is out of range"),
        (SHAPE, [text()], 7, "tokens=2 is out of range"),  # the shortest part; the longest is within the range
        ((3, 4, 1000, 1000), [text()], 8, r"dit_core_2h: .*tokens=750000 is out of range"),
        (SHAPE, [text(), text(321)], 1, "llm_tokens=321 is out of range"),
        (SHAPE, [text(llm_channels=7)], 1, 'dit_context: input "llm_states"'),
        (SHAPE, [text(clip_tokens=76)], 1, 'dit_context: input "clip_states"'),
    ],
)
def test_what_does_not(shape: Shape, texts: list[TextStates], parts: int, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        check_shapes(specs(), CONFIG, shape, texts, parts)
