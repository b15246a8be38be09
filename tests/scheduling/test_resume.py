"""The real model on ranks that are killed: the request goes on, and its result has the same bits."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import Event, ResultEvent, StepEvent
from stepvideo_serve.scheduling.progress import Repeated, Resumable, ResumableDenoise
from stepvideo_serve.scheduling.resume import run_on
from stepvideo_serve.scheduling.run_queue import QueuedRun, RunTerms, Waiting
from tests.mini import job_settings
from tests.serving.launch import EAGER, ranks

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
PARAMS: dict[str, Any] = {
    "kind": "denoise",
    "settings": job_settings(STEPS, cfg_scale=4.0, preview_every=2),
}


class NoAnswer:
    """Where the responses of a run go, which nobody reads."""

    def send(self, outputs: dict[str, NDArray[Any]]) -> None: ...
    def waiting(self, waiting: Waiting) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


@pytest.fixture(scope="module")
def make_config(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The configuration of a server with this layout, in eager torch."""

    def make(layout: str) -> Path:
        path = tmp_path_factory.mktemp("resume") / "serve.toml"
        path.write_text(EAGER.format(model=mini_checkpoint, layout=layout))
        return path

    return make


@pytest.fixture(scope="module")
def one_rank(make_config: Callable[[str], Path], root: Path) -> Iterator[RankGroup]:
    with ranks(root, make_config("single"), 1) as group:
        yield group


@pytest.fixture(scope="module")
def two_ranks(make_config: Callable[[str], Path], root: Path) -> Iterator[RankGroup]:
    with ranks(root, make_config("cfg2"), 2) as group:
        yield group


def events_of(group: RankGroup, job: Resumable, kill_after: int | None = None) -> list[Event]:
    """All events; the last rank is killed when so many have come."""
    events: list[Event] = []
    for event in run_on(group, QueuedRun("run", RunTerms(job), NoAnswer()), max_resumes=1):
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


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one_rank", "two_ranks"])
def test_denoising_goes_on_after_the_last_completed_step(layout: str, request: pytest.FixtureRequest) -> None:
    group: RankGroup = request.getfixturevalue(layout)
    undisturbed = events_of(group, ResumableDenoise(PARAMS, TENSORS, STEPS))
    assert [event.params["step"] for event in undisturbed if isinstance(event, StepEvent)] == [1, 2, 3, 4, 5]
    assert "preview" in undisturbed[1].tensors
    assert_same(events_of(group, ResumableDenoise(PARAMS, TENSORS, STEPS), kill_after=1), undisturbed)


@pytest.mark.slow
def test_after_the_last_step_no_rank_is_needed(two_ranks: RankGroup) -> None:
    undisturbed = events_of(two_ranks, ResumableDenoise(PARAMS, TENSORS, STEPS))
    assert_same(events_of(two_ranks, ResumableDenoise(PARAMS, TENSORS, STEPS), kill_after=STEPS), undisturbed)


@pytest.mark.slow
def test_decoding_goes_on_after_the_last_chunk(two_ranks: RankGroup) -> None:
    latents = {"latents": NORMAL((12, 4, 2, 2)).astype(np.float32)}
    undisturbed = events_of(two_ranks, Repeated("decode", latents))
    assert len(undisturbed) > 2
    assert isinstance(undisturbed[-1], ResultEvent)
    assert_same(events_of(two_ranks, Repeated("decode", latents), kill_after=1), undisturbed)


def test_a_decoding_that_begins_again_drops_what_was_seen() -> None:
    job = Repeated("decode", {})
    chunk = StepEvent({}, {})
    for news in ([True, True], [False, False, True], [False], [False, False, False, True]):
        job.begin()
        assert [job.take(chunk) for _ in news] == news
