"""Evaluations of runs to come, from those that have ended, and the seconds that follow."""

import json
from typing import Any

import numpy as np
import pytest

from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.parallel.job import StepEvent
from stepvideo_serve.planning.evaluations import EvaluationCounts, Expected, RunPace
from stepvideo_serve.planning.pace import Pace
from stepvideo_serve.request.presets import EXACT_PRESET, Preset, shipped_presets
from stepvideo_serve.scheduling.progress import ResumableDenoise
from tests.mini import job_settings

SMALL = DiTConfig(2, 3, 8, 8, 1, 16, 16)
BALANCED, FAST = (shipped_presets()[name] for name in ("balanced", "fast"))
MASK = "1100010001"
TENSORS: dict[str, Any] = {
    "latents": np.zeros((3, 8, 4, 6), np.float32),
    **{f"{name}_{kind}": np.zeros((20, 1)) for name in ("positive", "negative") for kind in ("llm", "clip")},
}


def test_what_is_known_beforehand_needs_no_run() -> None:
    counts = EvaluationCounts()
    assert counts.expected(EXACT_PRESET, 50, 100) == Expected(50, 50, 50)
    assert counts.expected(BALANCED, 9, 100) == Expected(9, 9, 9), "below ten steps nothing is forecast"
    assert counts.expected(Preset("fixed", mask=MASK, cfg_scale=4.0, time_shift=7.0), 10, 100) == Expected(4, 4, 4)
    assert counts.expected(BALANCED, 50, 100) is None


def test_runs_of_the_same_preset_steps_and_size_count_and_else_the_nearest() -> None:
    counts = EvaluationCounts()
    for evaluations in (14, 16, 21):
        counts.note(BALANCED, 50, 100, evaluations, evaluations)
    counts.note(BALANCED, 20, 100, 12, 6)
    assert counts.expected(BALANCED, 50, 100) == Expected(17, 14, 21, 1.0, 3)
    assert counts.expected(BALANCED, 50, 400) == Expected(17, 14, 21, 1.0, 3, alike=False)
    assert counts.expected(BALANCED, 10, 100) == Expected(6, 6, 6, 0.5, 1, alike=False)
    assert counts.expected(FAST, 50, 100) is None, "another preset says nothing"
    sent = json.loads(json.dumps(counts.points()))
    assert EvaluationCounts(sent).expected(BALANCED, 50, 100) == counts.expected(BALANCED, 50, 100)


def job_of(quality: str) -> ResumableDenoise:
    settings = {**job_settings(10, cfg_scale=4.0), "quality": quality}
    return ResumableDenoise({"kind": "denoise", "settings": settings}, TENSORS, 10)


def take(job: ResumableDenoise, mask: str, guided: bool = True) -> None:
    for step, digit in enumerate(mask, start=11 - job.steps_left):
        params = {"step": step, "evaluated": digit == "1", "guided": guided}
        job.take(StepEvent(params, {"latents": TENSORS["latents"]}))


@pytest.fixture
def pace() -> RunPace:
    """Steps take 2 s, or 1 s without guidance; forecasts 0.25 s."""
    pace = Pace(SMALL)
    for guided, seconds in ((True, 2.0), (False, 1.0)):
        pace.note(TENSORS, seconds, guided=guided)
    pace.note(TENSORS, 0.25, evaluated=False)
    return RunPace(pace, {**shipped_presets(), "late": Preset("exact", guidance_from=0.1)})


def test_seconds_of_a_mask_are_exact_wherever_the_run_stands(pace: RunPace) -> None:
    job = job_of(f"mask:{MASK}")
    for done in range(10):
        left = MASK[done:]
        assert pace.seconds_left(job) == pytest.approx(2.0 * left.count("1") + 0.25 * left.count("0"))
        take(job, MASK[done])
    assert pace.seconds_left(job) == 0.0


def test_an_adaptive_run_takes_what_others_took(pace: RunPace) -> None:
    job = job_of("fast")
    assert pace.seconds_left(job) is None, "nobody knows yet"
    for mask in ("1111000101", "1101000101"):
        ended = job_of("fast")
        take(ended, mask)
        pace.ended(ended)
    assert pace.seconds_left(job) == pytest.approx(2.0 * 5.5 + 0.25 * 4.5)
    take(job, "1111000100"[:9])
    assert pace.seconds_left(job) == pytest.approx(2.0), "the last step is evaluated in any case"


def test_a_guidance_interval_is_cheaper_by_what_was_seen(pace: RunPace) -> None:
    job = job_of("late")
    assert pace.seconds_left(job) == pytest.approx(20.0)
    ended = job_of("late")
    take(ended, "1111", guided=False)
    take(ended, "111111")
    pace.ended(ended)
    assert pace.seconds_left(job) == pytest.approx(6 * 2.0 + 4 * 1.0)


def test_layouts_of_cfg2_gain_nothing_without_guidance() -> None:
    plain, cfg2 = Pace(SMALL), Pace(SMALL, skips_branches=False)
    assert plain.step_flops(TENSORS, guided=False) * 2 == plain.step_flops(TENSORS)
    assert cfg2.step_flops(TENSORS, guided=False) == cfg2.step_flops(TENSORS)
