"""The real model on ranks that are killed: the request goes on, and its result has the same bits."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepvideo_serve.errors import RequestCancelled
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
FORECAST_STEPS = 14
# Presets of quality by which the mini checkpoint forecasts some of these steps.
PRESETS = """
[presets.adaptive]
rule = "adaptive"
tolerance = 100
dense_start = 0.01
dense_end = 0.9
longest_streak = 3

[presets.interval]
rule = "adaptive"
tolerance = 100
dense_start = 0
dense_end = 0.9
longest_streak = 3
guidance_from = 0.1
guidance_to = 0.5

[presets.recorded]
rule = "fixed"
mask = "11001000100011"
cfg_scale = 4
time_shift = 7
"""
QUALITIES = ("adaptive", "interval", "recorded", "mask:11100000010001")


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
        path.write_text(EAGER.format(model=mini_checkpoint, layout=layout) + PRESETS)
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


@pytest.fixture(scope="module")
def two_behind(make_config: Callable[[str], Path], root: Path) -> Iterator[RankGroup]:
    """Two ranks that look at a step when the next one has been begun, as on GPUs."""
    with ranks(root, make_config("cfg2"), 2, "tests.scheduling.lagging_ranks:one_behind") as group:
        yield group


def events_of(group: RankGroup, job: Resumable, kill_after: int | None = None) -> list[Event]:
    """All events; the last rank is killed when so many have come, and the group knows at the end, also where the run
    needed that rank no longer."""
    events: list[Event] = []
    generation = group.generation
    for event in run_on(group, QueuedRun("run", RunTerms(job), NoAnswer()), max_resumes=1):
        events.append(event)
        if len(events) == kill_after:
            os.kill(group.pids[-1], signal.SIGKILL)
    while kill_after is not None and (group.last_loss is None or group.last_loss.generation < generation):
        time.sleep(0.005)
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


def denoise_of(quality: str) -> ResumableDenoise:
    settings = {**job_settings(FORECAST_STEPS, cfg_scale=4.0), "quality": quality}
    return ResumableDenoise({"kind": "denoise", "settings": settings}, TENSORS, FORECAST_STEPS)


def path_of(events: list[Event]) -> list[tuple[Any, ...]]:
    """Of each step and of the result, what must be the same however often the run was ended."""
    names = ("step", "evaluated", "guided", "evaluations")
    return [(*(event.params.get(name) for name in names), event.tensors["latents"].tobytes()) for event in events]


@pytest.mark.slow
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("layout", ["one_rank", "two_ranks"])
def test_a_run_that_forecasts_is_killed_at_any_step(layout: str, quality: str, request: pytest.FixtureRequest) -> None:
    """Amid forecasts; one preset also behind an evaluation and before the last step. Its mask repeats it."""
    group: RankGroup = request.getfixturevalue(layout)
    undisturbed = path_of(events_of(group, denoise_of(quality)))
    mask = "".join("1" if evaluated else "0" for _, evaluated, *_ in undisturbed[:-1])
    assert "00" in mask
    amid = mask.index("00") + 1
    for kill_after in (2, amid, FORECAST_STEPS - 1) if quality == "adaptive" else (amid,):
        assert path_of(events_of(group, denoise_of(quality), kill_after)) == undisturbed, kill_after
    if quality != "interval":  # a mask says nothing about guidance
        assert path_of(events_of(group, denoise_of(f"mask:{mask}"))) == undisturbed


def park(group: RankGroup, run: QueuedRun, events: list[Event], park_after: int) -> None:
    """Serves the run, and has it give way when so many events have come in all."""
    for event in run_on(group, run, max_resumes=0):
        events.append(event)
        if len(events) == park_after:
            run.parked.set()
            group.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("quality", ["exact", "adaptive"])
def test_ranks_that_report_one_step_behind_give_the_same_bits(
    two_ranks: RankGroup, two_behind: RankGroup, quality: str
) -> None:
    """Undisturbed, killed while the step after the last one reported is under way, and parked twice."""
    undisturbed = path_of(events_of(two_ranks, denoise_of(quality)))
    assert path_of(events_of(two_behind, denoise_of(quality))) == undisturbed
    for kill_after in (1, 5, FORECAST_STEPS - 1):
        assert path_of(events_of(two_behind, denoise_of(quality), kill_after)) == undisturbed, kill_after
    assert parked_path(two_behind, quality) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("layout", ["one_rank", "two_ranks"])
def test_a_run_that_forecasts_is_parked_twice(layout: str, quality: str, request: pytest.FixtureRequest) -> None:
    """Another run goes in between, and the ranks keep nothing of this one."""
    group: RankGroup = request.getfixturevalue(layout)
    undisturbed = path_of(events_of(group, denoise_of(quality)))
    assert parked_path(group, quality) == undisturbed


def parked_path(group: RankGroup, quality: str) -> list[tuple[Any, ...]]:
    """Of a run that gives way after 3 and after 8 steps."""
    run = QueuedRun("run", RunTerms(denoise_of(quality)), NoAnswer())
    events: list[Event] = []
    for park_after in (3, 8):
        run.parked.clear()
        with pytest.raises(RequestCancelled):
            park(group, run, events, park_after)
        events_of(group, denoise_of("adaptive"))
    run.parked.clear()
    events += run_on(group, run, max_resumes=0)
    return path_of(events)


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
