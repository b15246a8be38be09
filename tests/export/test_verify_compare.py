"""When two tensors agree."""

import math

import pytest
import torch

from export.goldens.compare import compare
from export.goldens.report import Report


def test_floats_are_relative_to_the_largest_golden() -> None:
    golden = torch.tensor([100.0, -200.0, 0.0])
    row = compare("x", golden + torch.tensor([0.0, 0.0, 0.002]), golden, 2e-5)
    assert row.error == pytest.approx(1e-5)
    assert row.passed
    assert not compare("x", golden + torch.tensor([0.0, 0.0, 0.02]), golden, 2e-5).passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value: float) -> None:
    assert not compare("x", torch.tensor([1.0, value]), torch.tensor([1.0, 2.0]), 1.0).passed


def test_all_zero_goldens_are_compared_absolutely() -> None:
    assert compare("x", torch.full((2,), 1e-6), torch.zeros(2), 2e-5).passed
    assert not compare("x", torch.full((2,), 1e-3), torch.zeros(2), 2e-5).passed


def test_another_shape_fails() -> None:
    row = compare("x", torch.zeros(2, 3), torch.zeros(3, 2), 1.0)
    assert not row.passed
    assert row.shown == "shape [2, 3]"


def test_integers_are_exact() -> None:
    golden = torch.tensor([1, 2, 3])
    assert compare("x", golden.clone(), golden, 1.0).passed
    row = compare("x", torch.tensor([1, 2, 4]), golden, 1.0)
    assert not row.passed
    assert row.shown == "1 differ"


def test_bf16_goldens_allow_the_rounding_of_each_value_and_no_more() -> None:
    exact = torch.linspace(-3, 3, 1001)
    golden = exact.bfloat16()
    assert compare("x", exact, golden, 2e-5).passed
    assert not compare("x", exact * 1.01, golden, 2e-5).passed


@pytest.mark.parametrize(("levels", "count", "passed"), [(0, 0, True), (1, 3, True), (1, 4, False), (2, 1, False)])
def test_frames_may_differ_by_a_level_here_and_there(levels: int, count: int, passed: bool) -> None:
    golden = torch.full((1, 10, 100, 3), 128, dtype=torch.uint8)
    ours = golden.clone()
    ours.view(-1)[:count] += levels
    assert compare("x", ours, golden, 0.0).passed is passed


def test_a_report_needs_rows_to_pass() -> None:
    report = Report(given=["in"], skipped={"other": "unknown entry"})
    assert not report.passed
    report.rows.append(compare("x", torch.ones(1), torch.ones(1), 2e-5))
    assert report.passed
    assert "passed: 1 entries compared" in str(report)
    report.rows.append(compare("y", torch.tensor([math.nan]), torch.ones(1), 2e-5))
    assert not report.passed
    assert report.to_json()["compared"][1]["error"] is None
