"""The time grid, the Euler steps on it, and guidance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stepvideo_serve.sampling.denoise import denoise, euler_step, flow_times, guide, needs_guidance
from tests.mini import normal

SHAPE = (3, 4, 2, 3)


@given(steps=st.integers(1, 200), shift=st.floats(0.1, 100.0))
def test_times_rise_from_noise_to_video(steps: int, shift: float) -> None:
    times = flow_times(steps, shift)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float32
    assert times[0] == pytest.approx(0.0, abs=1e-6)  # exactly 0 where the shift is a whole number
    assert times[-1] == 1.0
    assert (times[1:] > times[:-1]).all()


@pytest.mark.parametrize("shift", [1.0, 2.0, 5.0, 7.0, 13.0, 17.0])
def test_times_start_at_zero(shift: float) -> None:
    assert flow_times(50, shift)[0] == 0.0


def test_times_by_hand() -> None:
    assert flow_times(4, 1.0).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    expected = [0, 1 - 5.25 / 5.5, 1 - 3.5 / 4, 1 - 1.75 / 2.5, 1]  # 1 - 7u / (1 + 6u)
    assert flow_times(4, 7.0).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_larger_shift_stays_longer_near_the_noise() -> None:
    small, large = flow_times(50, 7.0), flow_times(50, 13.0)
    assert (large[1:-1] < small[1:-1]).all()


def test_a_constant_velocity_is_followed_exactly() -> None:
    """Whole numbers and steps of a quarter: no rounding at all."""
    start = torch.arange(72.0).reshape(SHAPE)
    speed = 4 * torch.arange(72.0).flip(0).reshape(SHAPE)
    *_, end = denoise(start, flow_times(4, 1.0), lambda latents, time: speed)  # noqa: ARG005
    assert torch.equal(end, start + speed)


@pytest.mark.parametrize("shift", [0.5, 7.0, 13.0])
def test_a_straight_flow_ends_at_its_target(shift: float) -> None:
    noise, target = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    *_, end = denoise(noise, flow_times(50, shift), lambda latents, time: target - noise)  # noqa: ARG005
    assert torch.allclose(end, target, atol=2e-6)


def test_the_velocity_sees_the_latents_and_time_of_its_step() -> None:
    times = flow_times(5, 7.0)
    seen: list[tuple[Tensor, float]] = []

    def velocity(latents: Tensor, time: float) -> Tensor:
        seen.append((latents, time))
        return torch.ones_like(latents)

    after = list(denoise(normal(*SHAPE), times, velocity))
    assert [time for _, time in seen] == times[:-1].tolist()
    for (latents, _), earlier in zip(seen[1:], after[:-1], strict=True):
        assert torch.equal(latents, earlier)


def curved(latents: Tensor, time: float) -> Tensor:
    """A velocity that depends on everything."""
    return torch.sin(3 * latents + time) - latents.mean(dim=0) * time


@pytest.mark.parametrize("start", [1, 4, 9])
def test_a_run_taken_up_in_the_middle_gives_the_same_bits(start: int) -> None:
    times = flow_times(10, 7.0)
    whole = list(denoise(normal(*SHAPE), times, curved))
    rest = list(denoise(whole[start - 1], times, curved, start))
    assert len(whole) == 10
    assert len(rest) == 10 - start
    for one, other in zip(rest, whole[start:], strict=True):
        assert torch.equal(one, other)


def test_steps_are_computed_when_they_are_asked_for() -> None:
    calls = []

    def velocity(latents: Tensor, time: float) -> Tensor:
        calls.append(time)
        return latents

    loop = denoise(normal(*SHAPE), flow_times(4, 7.0), velocity)
    assert len(calls) == 0
    next(loop)
    assert len(calls) == 1


def test_given_latents_are_left_alone() -> None:
    latents = normal(*SHAPE)
    before = latents.clone()
    results = list(denoise(latents, flow_times(3, 7.0), curved))
    assert torch.equal(latents, before)
    assert len({result.data_ptr() for result in results}) == 3


def test_steps_are_taken_in_fp32() -> None:
    times = flow_times(50, 7.0)
    step = euler_step(normal(*SHAPE).bfloat16(), normal(*SHAPE, seed=1).bfloat16(), times, 0)
    assert step.dtype == torch.float32
    exact = normal(*SHAPE).bfloat16().double() + normal(*SHAPE, seed=1).bfloat16().double() * float(times[1])
    assert torch.allclose(step.double(), exact, rtol=1e-6, atol=1e-7)


def test_guidance_by_hand() -> None:
    conditional, unconditional = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    assert guide(conditional, unconditional, 9.0).tolist() == [19.0, -17.0]
    assert guide(conditional, unconditional, 1.0).tolist() == conditional.tolist()
    assert guide(conditional, unconditional, 0.0).tolist() == unconditional.tolist()


@pytest.mark.parametrize(("scale", "needed"), [(0.0, False), (1.0, False), (1.001, True), (9.0, True)])
def test_guidance_costs_a_second_branch_above_one(scale: float, needed: bool) -> None:
    assert needs_guidance(scale) is needed
