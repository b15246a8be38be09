"""The interval of a median, which `make bench` prints, against the table of the sign test."""

import pytest

from perf.serving_overhead import median_interval


@pytest.mark.parametrize(("count", "first"), [(6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (15, 4), (20, 6)])
def test_the_interval_of_a_median(count: int, first: int) -> None:
    """Order statistics that hold the median with 95 % confidence (Conover, Practical Nonparametric Statistics, A3)."""
    values = [float(i) for i in range(1, count + 1)]
    assert median_interval(values) == (float(first), float(count + 1 - first))


def test_too_few_values_give_the_extremes() -> None:
    assert median_interval([1.0, 2.0, 3.0]) == (1.0, 3.0)
