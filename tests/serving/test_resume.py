"""The real model on ranks that are killed: the request goes on, and its result has the same bits."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.run import Event, ResultEvent, StepEvent
from stepvideo_serve.serving.resume import Resumable, ResumableDecode, ResumableDenoise, run_on
from stepvideo_serve.serving.run_queue import QueuedRun

STEPS = 5
NORMAL = np.random.default_rng(7).standard_normal
TENSORS = {
    "latents": NORMAL((6, 4, 3, 5)).astype(np.float32),
    "condition": NORMAL((4, 3, 5)).astype(np.float32),
    "positive_llm": NORMAL((9, 48)).astype(np.float32),
    "positive_clip": NORMAL((77, 32)).astype(np.float32),
    "negative_llm": NORMAL((5, 48)).astype(np.float32),
    "negative_clip": NORMAL((77, 32)).astype(np.float32),
}
PARAMS = {
    "steps": STEPS,
    "cfg_scale": 4.0,
    "time_shift": 7.0,
    "motion_score": 5.0,
    "preview_every": 2,
    "timeout_s": None,
}


class NoAnswer:
    """Where the responses of a run go, which nobody reads."""

    def send(self, outputs: dict[str, NDArray[Any]]) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


@pytest.fixture(scope="module", params=["single", "cfg2"])
def group(
    request: pytest.FixtureRequest, root: Path, mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RankGroup]:
    """Ranks of `dit_denoiser` in eager torch."""
    config = tmp_path_factory.mktemp("resume") / "serve.toml"
    config.write_text(
        f'[model]\ndir = "{mini_checkpoint}"\nengines_dir = "none"\nbackend = "eager"\n'
        f'[denoiser]\nlayout = "{request.param}"\nthreads = 1\n[decoder]\nthreads = 1\n'
    )
    group = RankGroup(
        "stepvideo_serve.serving.rank:build_rank",
        {"config": str(config)},
        size=1 if request.param == "single" else 2,
        start_timeout_s=120.0,
        arena_bytes=1 << 22,
        threads_per_rank=1,
        env={"PYTHONPATH": str(root)},
    )
    with group:
        yield group


def events_of(group: RankGroup, job: Resumable, kill_after: int | None = None) -> list[Event]:
    """All events; the last rank is killed when so many have come."""
    events: list[Event] = []
    for event in run_on(group, QueuedRun("run", {"timeout_s": None}, {}, NoAnswer()), job, max_resumes=1):
        events.append(event)
        if len(events) == kill_after:
            os.kill(group.pids[-1], signal.SIGKILL)
    return events


def assert_same(events: list[Event], undisturbed: list[Event]) -> None:
    assert [type(event) for event in events] == [type(event) for event in undisturbed]
    for event, expected in zip(events, undisturbed, strict=True):
        assert event.params.get("step") == expected.params.get("step")
        assert event.tensors.keys() == expected.tensors.keys()
        for name, tensor in event.tensors.items():
            np.testing.assert_array_equal(tensor, expected.tensors[name], strict=True)


@pytest.mark.parametrize("kill_after", [1, 3, STEPS])
def test_denoising_goes_on_after_the_last_completed_step(group: RankGroup, kill_after: int) -> None:
    undisturbed = events_of(group, ResumableDenoise(PARAMS, TENSORS))
    assert [event.params["step"] for event in undisturbed if isinstance(event, StepEvent)] == [1, 2, 3, 4, 5]
    assert "preview" in undisturbed[1].tensors
    group.start()
    generation = group.generation
    assert_same(events_of(group, ResumableDenoise(PARAMS, TENSORS), kill_after), undisturbed)
    group.start()
    assert group.generation in (generation, generation + 1), "after the last step the ranks may end in peace"


def test_decoding_goes_on_after_the_last_chunk(group: RankGroup) -> None:
    if group.size == 1:
        return
    latents = {"latents": NORMAL((9, 4, 3, 5)).astype(np.float32)}
    undisturbed = events_of(group, ResumableDecode({}, latents))
    assert len(undisturbed) > 2
    assert isinstance(undisturbed[-1], ResultEvent)
    assert_same(events_of(group, ResumableDecode({}, latents), kill_after=1), undisturbed)
