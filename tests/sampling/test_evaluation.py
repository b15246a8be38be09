"""When steps are evaluated, what stands for their velocity elsewhere, and that a run goes on with the same bits."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import components, dit_graph_names
from stepvideo_serve.dit.velocity import DiTVelocity
from stepvideo_serve.engine.runner import EagerRunner
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request.presets import EXACT_PRESET, Preset
from stepvideo_serve.sampling.denoise import denoise, euler_step, flow_times, guide
from stepvideo_serve.sampling.evaluation import EvaluatedSteps, EvaluationPlan, LoopState, guided_share
from stepvideo_serve.sampling.job import DenoiseJob, StepDone, run_job
from stepvideo_serve.text.states import CLIP_TOKENS, TextStates
from stepvideo_serve.video.preview import LatentPreview
from tests.mini import MINI, job_settings, normal, relative_error

SHAPE = (3, 4, 2, 3)
Field = Callable[[Tensor, float, bool], Tensor]
NEVER: dict[str, Any] = {"tolerance": 1e9, "dense_start": 0.0, "dense_end": 1.0, "longest_streak": 1000}


def adaptive(**changes: Any) -> Preset:
    values = {"tolerance": 0.1, "dense_start": 0.02, "dense_end": 0.9, "longest_streak": 20}
    return Preset("adaptive", **{**values, **changes})


def curved(latents: Tensor, time: float, guided: bool = True) -> Tensor:
    """A smooth velocity that depends on everything."""
    return (2.0 if guided else 1.0) * torch.sin(latents + 2 * time) - latents.mean(dim=0) * time


def straight(latents: Tensor, time: float, guided: bool) -> Tensor:  # noqa: ARG001
    """Linear in time, whatever the latents."""
    return normal(*SHAPE, seed=1) + time * normal(*SHAPE, seed=2)


def plan_of(preset: Preset, steps: int = 50, shift: float = 7.0, scale: float = 4.0) -> EvaluationPlan:
    return EvaluationPlan.of(preset, flow_times(steps, shift), scale > 1, scale, shift)


def run(
    plan: EvaluationPlan, field: Field = curved, start: int = 0, latents: Tensor | None = None, **options: Any
) -> tuple[list[Tensor], list[LoopState]]:
    """Latents and state after each step."""
    velocity = EvaluatedSteps(plan, field, start, **options)
    after, states = [], []
    first = normal(*SHAPE) if latents is None else latents
    for step in denoise(first, torch.tensor(plan.times), velocity, start):
        after.append(step)
        states.append(velocity.state)
    return after, states


@given(steps=st.integers(1, 60), shift=st.floats(0.5, 20.0))
@settings(deadline=None, max_examples=20)
def test_exact_is_the_plain_loop_bit_for_bit(steps: int, shift: float) -> None:
    plain = list(denoise(normal(*SHAPE), flow_times(steps, shift), lambda x, t: curved(x, t)))
    after, states = run(plan_of(EXACT_PRESET, steps, shift))
    assert all(torch.equal(one, other) for one, other in zip(after, plain, strict=True))
    assert states[-1].mask == "1" * steps
    assert all(state.tensors() == {} for state in states)


@pytest.mark.parametrize("steps", range(1, 10))
def test_below_ten_steps_every_step_is_evaluated(steps: int) -> None:
    after, states = run(plan_of(adaptive(**NEVER), steps))
    assert states[-1].mask == "1" * steps
    assert torch.equal(after[-1], run(plan_of(EXACT_PRESET, steps))[0][-1])


def test_from_ten_steps_on_some_are_forecast() -> None:
    assert run(plan_of(adaptive(**NEVER), 10))[1][-1].mask == "1100000001"


def test_a_velocity_that_is_linear_in_time_is_forecast_exactly() -> None:
    plan = plan_of(adaptive(**NEVER))
    after, states = run(plan, straight)
    assert states[-1].evaluations == 3
    assert torch.allclose(after[-1], run(plan_of(EXACT_PRESET), straight)[0][-1], atol=2e-5)


@pytest.mark.parametrize(("scale", "shift"), [(4.0, 7.0), (9.0, 13.0), (1.0, 1.0)])
@pytest.mark.parametrize("tolerance", [0.1, 0.3])
def test_the_adaptive_rule_by_hand(scale: float, shift: float, tolerance: float) -> None:
    """acc += g |x_i - x_(i-1)| / |v_j| with g = |v_j - v_k| / |x_j - x_k|, on the latents themselves."""
    plan = plan_of(adaptive(tolerance=tolerance), shift=shift, scale=scale)
    times, latents = flow_times(50, shift).tolist(), normal(*SHAPE)
    known: list[tuple[float, Tensor, Tensor]] = []
    before, total, streak, mask = latents, 0.0, 0, ""
    for step, time in enumerate(times[:-1]):
        evaluated = len(known) < 2 or time < 0.02 or time >= 0.9 or step == 49
        if len(known) >= 2:
            (_, v_k, x_k), (_, v_j, x_j) = known[-2:]
            rate = float((v_j - v_k).norm() / (x_j - x_k).norm())
            total += rate * float((latents - before).norm() / v_j.norm())
            evaluated = evaluated or total >= tolerance or streak == 20
        if evaluated:
            velocity = curved(latents, time, scale > 1)
            known.append((time, velocity, latents))
            total, streak = 0.0, 0
        else:
            (t_k, v_k, _), (t_j, v_j, _) = known[-2:]
            velocity, streak = v_j + (v_j - v_k) * ((time - t_j) / (t_j - t_k)), streak + 1
        mask += str(int(evaluated))
        before, latents = latents, euler_step(latents, velocity, torch.tensor(times), step)
    after, states = run(plan)
    assert states[-1].mask == mask
    assert mask.count("0") > 0
    assert relative_error(after[-1], latents) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 7.0, 13.0])
@pytest.mark.parametrize("steps", [20, 50, 100])
def test_dense_parts_are_counted_in_time(steps: int, shift: float) -> None:
    preset = adaptive(**{**NEVER, "dense_start": 0.1, "dense_end": 0.8})
    mask = run(plan_of(preset, steps, shift))[1][-1].mask
    times = flow_times(steps, shift).tolist()[:-1]
    expected = [i < 2 or i == steps - 1 or time < 0.1 or time >= 0.8 for i, time in enumerate(times)]
    assert mask == "".join(str(int(one)) for one in expected)


def test_the_longest_streak() -> None:
    mask = run(plan_of(adaptive(**{**NEVER, "longest_streak": 4})))[1][-1].mask
    assert max(len(zeros) for zeros in mask.split("1")) == 4
    assert mask.startswith("11000010000100001")


@pytest.mark.parametrize("preset", [adaptive(), adaptive(guidance_from=0.05, guidance_to=0.6)])
@pytest.mark.parametrize("start", [1, 2, 7, 8, 16, 22, 29])
def test_a_run_taken_up_anywhere_gives_the_same_bits(preset: Preset, start: int) -> None:
    """From the scalars as JSON and the tensors as bytes, in the midst of a streak of forecasts too."""
    plan = plan_of(preset, 30)
    after, states = run(plan)
    state = states[start - 1]
    scalars = json.loads(json.dumps(state.scalars()))
    tensors = {name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in state.tensors().items()}
    assert len(tensors) <= 2
    again, states_again = run(plan, start=start, latents=after[start - 1], state=LoopState.restored(scalars, tensors))
    assert torch.equal(torch.stack(again), torch.stack(after[start:]))
    assert states_again[-1].mask == states[-1].mask
    assert "0" in states[-1].mask


def test_without_its_state_a_run_is_not_gone_on_with() -> None:
    plan = plan_of(adaptive())
    latents, states = run(plan)
    for state in (None, states[4]):
        with pytest.raises(InvalidRequest, match="after step 9 needs the state of that step, got"):
            run(plan, start=9, latents=latents[8], state=state)
    exact = plan_of(EXACT_PRESET)
    whole = run(exact)[0]
    assert torch.equal(run(exact, start=9, latents=whole[8])[0][-1], whole[-1])


def test_the_decision_of_the_leader_holds() -> None:
    leader: list[int] = []

    def noted(step: int) -> int:
        leader.append(step)
        return step

    after, states = run(plan_of(adaptive()), agree=noted)
    assert "0" in states[-1].mask
    asked: list[int] = []

    def told(step: int) -> int:
        asked.append(step)
        return leader[len(asked) - 1]

    other, states_of_other = run(plan_of(adaptive(tolerance=1e-6)), agree=told)
    assert asked != leader
    assert len(asked) == states[-1].evaluations
    assert states_of_other[-1].mask == states[-1].mask
    assert torch.equal(other[-1], after[-1])


def test_nobody_is_asked_when_nothing_is_forecast() -> None:
    def never(step: int) -> int:
        raise AssertionError(step)

    run(plan_of(EXACT_PRESET), agree=never)
    run(plan_of(adaptive(), 9), agree=never)


def test_the_mask_of_a_run_repeats_it() -> None:
    after, states = run(plan_of(adaptive()))
    fixed = Preset("fixed", mask=states[-1].mask, cfg_scale=4.0, time_shift=7.0)
    again, states_again = run(plan_of(fixed))
    assert torch.equal(again[-1], after[-1])
    assert states_again[-1].mask == states[-1].mask


@pytest.mark.parametrize(
    ("steps", "scale", "shift", "message"),
    [
        (49, 9.0, 13.0, "one digit for each of the 49 steps, got 50"),
        (9, 9.0, 13.0, "one digit for each of the 9 steps, got 50"),
        (50, 4.0, 13.0, "CFG_SCALE = 9 and TIME_SHIFT = 13 only, got 4 and 13"),
        (50, 9.0, 7.0, "CFG_SCALE = 9 and TIME_SHIFT = 13 only, got 9 and 7"),
    ],
)
def test_a_fixed_preset_holds_for_its_settings_only(steps: int, scale: float, shift: float, message: str) -> None:
    fixed = Preset("fixed", mask="11" + "0" * 47 + "1", cfg_scale=9.0, time_shift=13.0)
    assert run(plan_of(fixed, 50, 13.0, 9.0))[1][-1].evaluations == 3
    with pytest.raises(InvalidRequest, match=message):
        plan_of(fixed, steps, shift, scale)


def test_a_mask_evaluates_where_guidance_sets_in() -> None:
    fixed = Preset("fixed", mask="11" + "0" * 47 + "1", cfg_scale=4.0, time_shift=7.0, guidance_from=0.1)
    with pytest.raises(InvalidRequest, match="must evaluate step 23, where guidance sets in or ends, got 0"):
        plan_of(fixed)


def test_the_history_begins_anew_where_guidance_changes() -> None:
    """Two steps are evaluated behind each change, and no forecast looks across."""
    preset = adaptive(**NEVER, guidance_from=0.1, guidance_to=0.6)
    plan = plan_of(preset, 50, 13.0, 9.0)
    assert plan.guided == tuple(0.1 <= time < 0.6 for time in plan.times[:-1])

    def jumps(latents: Tensor, time: float, guided: bool) -> Tensor:
        return straight(latents, time, guided) * (9.0 if guided else 1.0)

    after, states = run(plan, jumps)
    changes = [i for i in range(50) if plan.begins_anew(i)]
    expected = {*changes, *(i + 1 for i in changes), 49}
    assert {i for i, digit in enumerate(states[-1].mask) if digit == "1"} == expected
    every = replace(plan, preset=Preset("exact", guidance_from=0.1, guidance_to=0.6))
    assert relative_error(after[-1], run(every, jumps)[0][-1]) < 1e-5
    assert guided_share(plan, states[-1].mask) == pytest.approx(2 / len(expected))


def test_all_is_guided_by_default_from_the_very_first_step() -> None:
    """The first time may be a rounding below 0."""
    for shift in (0.3, 1.7, 3.1, 6.9, 7.0, 13.0):
        assert all(plan_of(EXACT_PRESET, 50, shift).guided)
    assert not any(plan_of(EXACT_PRESET, 50, 7.0, scale=1.0).guided)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_velocity_without_a_rate_of_change_is_evaluated_every_time(value: float) -> None:
    def broken(latents: Tensor, time: float, guided: bool) -> Tensor:  # noqa: ARG001
        return torch.full_like(latents, value)

    assert run(plan_of(adaptive()), broken)[1][-1].mask == "1" * 50


# --- on the DiT ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit(mini_checkpoint: Path) -> DiTVelocity:
    checkpoint = Checkpoint(mini_checkpoint)
    table = components(checkpoint, "fp32")
    names = dit_graph_names(checkpoint.dit_config.num_layers)
    graphs = {name: EagerRunner(table[name].spec, table[name].load()) for name in names}
    return DiTVelocity(graphs, checkpoint.dit_config, torch.float32)


def make_job(**changes: Any) -> DenoiseJob:
    texts = [TextStates(normal(n, MINI.dit.llm_channels, seed=n), normal(CLIP_TOKENS, 32, seed=n + 1)) for n in (9, 5)]
    job = DenoiseJob(normal(*SHAPE), normal(*SHAPE[1:], seed=3), texts[0], texts[1], job_settings(14, 4.0))
    return replace(job, **changes)


def done(job: DenoiseJob, dit: DiTVelocity, **options: Any) -> list[StepDone]:
    return list(run_job(job, dit, LatentPreview(torch.eye(3, 4), torch.zeros(3)).render, **options))


def test_a_job_without_preset_has_the_bits_of_the_plain_loop(dit: DiTVelocity) -> None:
    job = make_job()
    assert job.negative is not None
    request = dit.prepare(SHAPE, job.condition, job.motion_score, (job.positive, job.negative))

    def velocity(latents: Tensor, at: float) -> Tensor:
        conditional, unconditional = dit(latents, at, request)
        return guide(conditional, unconditional, 4.0)

    plain = list(denoise(job.latents, flow_times(14, 7.0), velocity))
    steps = done(job, dit)
    assert all(torch.equal(step.latents, x) for step, x in zip(steps, plain, strict=True) if step.latents is not None)
    assert [step.evaluations for step in steps] == list(range(1, 15))
    assert all(step.evaluated for step in steps)


def test_a_job_counts_its_evaluations_and_leaves_out_the_negative_branch(dit: DiTVelocity) -> None:
    job = make_job(preset=adaptive(**NEVER, guidance_from=0.2))
    branches: list[int] = []

    class Counting(DiTVelocity):
        def __call__(self, latents: Tensor, time: float, request: Any) -> tuple[Tensor, ...]:
            branches.append(len(request.branches))
            return dit(latents, time, request)

    counting = Counting.__new__(Counting)
    counting.__dict__.update(dit.__dict__)
    steps = done(job, counting)
    assert [step.evaluated for step in steps] == [digit == "1" for digit in steps[-1].state.mask]  # type: ignore[union-attr]
    assert steps[-1].evaluations == len(branches) == sum(step.evaluated for step in steps) < 14
    assert branches[:2] == [1, 1]
    assert branches[2:] == [2] * (len(branches) - 2)


def test_a_job_goes_on_with_the_same_bits(dit: DiTVelocity) -> None:
    job = make_job(preset=adaptive(**{**NEVER, "longest_streak": 3}))
    whole = done(job, dit)
    assert whole[-1].evaluations == 5
    for step in whole[:-1]:
        assert step.latents is not None
        rest = done(replace(job, start_step=step.step, latents=step.latents, state=step.state), dit)
        assert torch.equal(rest[-1].latents, whole[-1].latents)  # type: ignore[arg-type]
        assert rest[-1].evaluations == whole[-1].evaluations


@pytest.mark.parametrize("forecasts", [False, True])
def test_a_step_is_told_when_the_next_one_has_been_begun_and_the_bits_are_the_same(
    dit: DiTVelocity, forecasts: bool
) -> None:
    job = make_job(preset=adaptive(**{**NEVER, "longest_streak": 3}), settings=job_settings(14, 4.0, preview_every=3))
    job = job if forecasts else replace(job, preset=EXACT_PRESET)
    calls: list[float] = []

    class Counting(DiTVelocity):
        def __call__(self, latents: Tensor, time: float, request: Any) -> tuple[Tensor, ...]:
            calls.append(time)
            return dit(latents, time, request)

    counting = Counting.__new__(Counting)
    counting.__dict__.update(dit.__dict__)
    at_once = done(job, dit)
    seen: list[int] = []
    behind: list[StepDone] = []
    for step in run_job(job, counting, LatentPreview(torch.eye(3, 4), torch.zeros(3)).render, behind=1):
        seen.append(len(calls))
        behind.append(step)
    assert [step.step for step in behind] == list(range(1, 15))
    if not forecasts:
        assert seen == [*range(2, 15), 14], "the next step has been begun; behind the last one there is none"
    for late, early in zip(behind, at_once, strict=True):
        assert torch.equal(late.latents, early.latents)  # type: ignore[arg-type]
        assert (late.evaluated, late.guided, late.evaluations) == (early.evaluated, early.guided, early.evaluations)
        assert (late.preview is None) == (early.preview is None) == (late.step % 3 != 0)
        assert late.state is not None
        assert early.state is not None
        assert late.state.scalars() == early.state.scalars()
        if late.step < 14:
            assert late.latents is not None
            rest = done(replace(job, start_step=late.step, latents=late.latents, state=late.state), dit, behind=1)
            assert torch.equal(rest[-1].latents, at_once[-1].latents)  # type: ignore[arg-type]
