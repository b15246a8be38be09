"""The gates of the price list: what FP8 and parallel layouts may cost, and that they cost no more."""

from pathlib import Path

import pytest

from toyworld import fp8_graphs, price_list
from toyworld.evaluate import CHECKPOINT
from toyworld.price_list import Price, faults, price_all
from toyworld.samples import Sampling

pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason=f"{CHECKPOINT} is not there: see toyworld.train")


def test_faults_name_what_is_too_dear() -> None:
    def row(name: str, error: float) -> Price:
        return Price(name, error, 30, 1, 1, 30)

    fine = [row("fp32", 0), row("bf16", 1e-2), row("fp8", 1.9e-2), row("tp2", 1e-6)]
    assert faults(fine) == []
    found = faults([row("fp32", 0), row("bf16", 1e-2), row("fp8", 2.1e-2), row("tp2", 1e-3)])
    assert [text.split()[0] for text in found] == ["Layout", "FP8"]


@pytest.mark.slow
def test_no_variant_is_dearer_than_it_may_be(tmp_path: Path) -> None:
    """FP8 with the layers kept in bf16 that its sensitivity report names; every layout that two heads allow."""
    assert fp8_graphs.make(CHECKPOINT, tmp_path, budget=1.4) == 0
    layouts = price_list.LAYOUTS.split(",")
    prices = price_all(CHECKPOINT, layouts, tmp_path / "graphs", scenes=2, sampling=Sampling(), threads=1)
    assert [row.variant for row in prices] == ["fp32", "bf16", "fp8", *layouts]
    assert faults(prices) == []
    by_name = {row.variant: row for row in prices}
    assert by_name["fp32"].latent_error == 0
    assert by_name["fp8"].latent_error > by_name["bf16"].latent_error > price_list.LAYOUT_TOLERANCE
    assert all(row.direction == row.colour == 1 for row in prices)
