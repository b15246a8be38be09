"""Real rank processes on the stub, with collectives that end whenever they end: the way of a request through them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepvideo_serve.assembly.stages import Denoiser, FrameDecoder
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import WorkerFailed
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import ResultEvent, StepEvent
from stepvideo_serve.parallel.layout import Layout
from tests.mini import relative_error
from tests.parallel.sharded_ranks import make_job, make_video

Configured = Callable[..., Path]
Load = Callable[..., ServeConfig]


@contextmanager
def ranks(
    root: Path, config: Path, layout: str, mutation: str = "", lost: dict[str, int] | None = None
) -> Iterator[RankGroup]:
    """A group of the real workers; see rank.py."""
    path = os.pathsep.join(str(root / folder) for folder in ("", "client", "kernels"))
    settings = {"config": str(config), "mutation": mutation, "lost": lost}
    with RankGroup(
        "tests.fakes.rank:build",
        settings,
        size=Layout.parse(layout).world_size,
        start_timeout_s=300.0,
        step_slack_s=120.0,
        arena_bytes=1 << 24,
        threads_per_rank=1,
        env={"PYTHONPATH": path},
    ) as group:
        group.start()
        yield group


def denoised(group: RankGroup) -> list[torch.Tensor]:
    """The latents after each step."""
    params, tensors = make_job().message()
    steps = []
    for event in group.run({**params, "timeout_s": None}, tensors):
        if isinstance(event, StepEvent | ResultEvent):
            steps.append(torch.from_numpy(event.tensors["latents"]))
    return steps


def decoded(group: RankGroup) -> Any:
    events = group.run({"kind": "decode", "timeout_s": None}, {"latents": make_video().numpy()})
    return np.concatenate([event.tensors["frames"] for event in events if "frames" in event.tensors])


@pytest.mark.parametrize("layout", ["single", "cfg2.sp2", "cfg2.tp2"])
def test_ranks_compute_what_one_process_does(layout: str, root: Path, configured: Configured, load: Load) -> None:
    expected = [done.latents for done in Denoiser(load("single", "ort")).run(make_job())]
    with ranks(root, configured(layout), layout) as group:
        found = denoised(group)
        for latents, reference in zip(found, [*expected, expected[-1]], strict=True):
            assert reference is not None
            assert relative_error(latents, reference) <= 1e-4
        if layout != "single":
            frames = np.concatenate(list(FrameDecoder(load("single", "ort")).decode(make_video())))
            assert np.abs(decoded(group).astype(int) - frames.astype(int)).max() <= 1
        assert group.generation == 1


def test_a_sum_that_is_not_waited_for_is_found(root: Path, configured: Configured) -> None:
    mutation = "tests.fakes.mutations:sums_are_not_waited_for"
    with (
        ranks(root, configured("tp2"), "tp2", mutation) as group,
        pytest.raises(WorkerFailed, match="nothing orders the two"),
    ):
        denoised(group)
