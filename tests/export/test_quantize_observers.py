"""Ranges of tensors: the maximum, percentiles by counting, and going on after an interruption."""

import json
import math

import pytest
import torch

from export.quantize.observers import BINS_PER_OCTAVE, AmaxObserver
from stepvideo_serve.errors import ExportError
from tests.mini import normal


def test_the_maximum_is_exact() -> None:
    observer = AmaxObserver()
    for seed in range(3):
        observer.observe(normal(50, 7, seed=seed))
    assert observer.amax == float(torch.stack([normal(50, 7, seed=seed) for seed in range(3)]).abs().max())


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9])
def test_a_percentile_is_right_to_one_bin(percentile: float) -> None:
    values = [normal(1000, seed=seed) * 10.0**seed for seed in range(4)]
    observer = AmaxObserver(percentile)
    for part in values:
        observer.observe(part)
    exact = float(torch.cat(values).abs().quantile(percentile / 100, interpolation="higher"))
    assert exact <= observer.amax * (1 + 1e-6)  # log2 in fp32 may put a value on a border into the bin below
    assert observer.amax <= exact * 2 ** (1 / BINS_PER_OCTAVE) * (1 + 1e-6)


def test_a_percentile_ignores_an_outlier_that_the_maximum_takes() -> None:
    values = torch.cat([normal(9999), torch.tensor([1e4])])
    clipped, largest = AmaxObserver(99.9), AmaxObserver()
    clipped.observe(values)
    largest.observe(values)
    assert largest.amax == 1e4
    assert clipped.amax < 5


def test_zeros_and_the_smallest_numbers_are_counted() -> None:
    observer = AmaxObserver(50.0)
    observer.observe(torch.tensor([0.0, 0.0, 1e-30, 8.0]))
    assert 0 < observer.amax <= 2.0**-63


def test_a_restored_observer_goes_on() -> None:
    whole, first = AmaxObserver(99.0), AmaxObserver(99.0)
    for seed in range(2):
        whole.observe(normal(500, seed=seed))
    first.observe(normal(500, seed=0))
    second = AmaxObserver.restore(json.loads(json.dumps(first.to_json())), 99.0)
    second.observe(normal(500, seed=1))
    assert second.amax == whole.amax


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ExportError, match="must be finite"):
        AmaxObserver().observe(torch.tensor([1.0, value]))


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.5, math.nan])
def test_a_wrong_percentile_is_refused(percentile: float) -> None:
    with pytest.raises(ExportError, match="--percentile must be above 0"):
        AmaxObserver(percentile)


@pytest.mark.parametrize("percentile", [99.0, 100.0])
def test_an_observer_that_saw_nothing_has_no_range(percentile: float) -> None:
    with pytest.raises(ExportError, match="it has seen none"):
        _ = AmaxObserver(percentile).amax
