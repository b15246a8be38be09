"""What the text stage hands to the DiT."""

from dataclasses import dataclass

from torch import Tensor

LLM_MAX_TOKENS = 320
CLIP_TOKENS = 77


@dataclass(frozen=True)
class TextStates:
    """States of one prompt: llm [L, D_llm] of its L <= 320 real tokens, clip [77, D_clip], both fp32 on the CPU."""

    llm: Tensor
    clip: Tensor
