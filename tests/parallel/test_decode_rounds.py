"""Decoding on ranks of which some have nothing to do: their short rounds say nothing about how long a chunk takes."""

from pathlib import Path

import numpy as np

from export.tiny_checkpoint import write_checkpoint
from stepvideo_serve.parallel.job import ResultEvent, StepEvent
from tests.mini import MINI
from tests.serving.launch import EAGER, ranks

SLACK_S = 0.05  # far less than a chunk takes
LATENTS = (3, MINI.dit.in_channels, 8, 12)  # one chunk of 128x192


def test_a_rank_that_decodes_nothing_does_not_set_the_pace(root: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", MINI)
    config = tmp_path / "serve.toml"
    config.write_text(EAGER.format(model=tmp_path / "model", layout="cfg2"))
    latents = np.random.default_rng(0).standard_normal(LATENTS, dtype=np.float32)
    with ranks(root, config, 2, step_slack_s=SLACK_S) as group:
        events = list(group.run({"kind": "decode", "timeout_s": None}, {"latents": latents}))
        assert group.generation == 1, "the ranks were lost and started again"
    frames = [event.tensors["frames"] for event in events if isinstance(event, StepEvent)]
    assert [chunk.shape for chunk in frames] == [(17, 128, 192, 3)]
    assert isinstance(events[-1], ResultEvent)
