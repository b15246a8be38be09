"""A checkpoint with one layer of each network in its full width, random, and small where width does not matter.

    python -m tests.engines.full_width OUT

In a process of its own, since it holds all weights at once.
"""

import sys
from dataclasses import replace
from pathlib import Path

from export.tiny.config import TINY_CLIP, TINY_LLM, TinyConfig
from export.tiny_checkpoint import write_checkpoint
from stepvideo_serve.planning.model_size import PUBLISHED


def config() -> TinyConfig:
    """3 GB of weights in bf16."""
    return TinyConfig(
        dit=replace(PUBLISHED.dit, num_layers=1, clip_channels=TINY_CLIP.width),
        llm=replace(PUBLISHED.llm, num_layers=1, vocab_size=TINY_LLM.vocab_size),
        vae=PUBLISHED.vae,
        dit_shards=1,
    )


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), config())
