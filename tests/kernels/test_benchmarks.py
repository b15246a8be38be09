"""The benchmark's cases at a tiny size: inputs, kernel, baselines and the check itself."""

from types import ModuleType

import pytest
import torch

from kernels.benchmarks import Case, cases
from stepvideo_kernels.choice import builds_of
from stepvideo_kernels.kernel_spec import FullSize, TileConfig
from stepvideo_kernels.launch.on_cuda import type_name
from tests.kernels.plugin_graphs import form_of

TINY = FullSize(batch=2, heads=2, video_tokens=37, llm_tokens=19, llm_groups=1, vae_tokens=35, vae_channels=32)
CPU = torch.device("cpu")
ALL = {f"{case.op}.{case.variant}": case for case in cases(TINY, CPU)}


def chosen_tile(case: Case) -> TileConfig:
    return next(b.tile for b in builds_of(case.op, TINY) if (b.variant, b.sm, b.chosen) == (case.variant, 90, True))


@pytest.mark.parametrize("name", ALL)
def test_case_passes_its_own_check(name: str, bench: ModuleType) -> None:
    case = ALL[name]
    given = case.inputs(torch.Generator().manual_seed(5))
    tile = chosen_tile(case)
    made = case.rows(case.kernel(given, tile))
    shares = bench.error_shares(made, case.own(given), case.exact(given))
    assert bench.too_large(tile.label, shares) == []
    assert len(shares) == 2 * len(made)


@pytest.mark.parametrize("name", ALL)
def test_check_notices_a_wrong_result(name: str, bench: ModuleType) -> None:
    case = ALL[name]
    given = case.inputs(torch.Generator().manual_seed(5))

    tile = chosen_tile(case)
    off = {name: (value.float() * 1.2).to(value.dtype) for name, value in case.kernel(given, tile).items()}
    shares = bench.error_shares(case.rows(off), case.own(given), case.exact(given))
    assert len(bench.too_large(tile.label, shares)) > 0
    assert bench.too_large(tile.label, {"error": float("nan")}) != []


@pytest.mark.parametrize("name", ALL)
def test_operands_are_what_the_operator_takes(name: str) -> None:
    """What the machine code is launched with: shapes, types and the names of the outputs."""
    case = ALL[name]
    given = case.inputs(torch.Generator().manual_seed(5))
    form, operands = form_of(case.operator), case.operands(given)
    elements = [type_name(one.dtype) for one in operands]
    shapes = form.named([tuple(one.shape) for one in operands])
    form.check(shapes, elements, 90)
    assert form.variant(elements[0]) == case.variant
    assert set(case.attributes) == set(form.attributes)
    made = case.kernel(given, chosen_tile(case))
    expected = zip((one.name for one in form.outputs), form.output_shapes(shapes), strict=True)
    assert {name: tuple(value.shape) for name, value in made.items()} == dict(expected)


def test_without_a_gpu_it_says_so(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        assert bench.main(["--only", "adaln*", "--repeats", "2"]) == 0
        return
    assert bench.main([]) == 1
    assert capsys.readouterr().err == "error: kernels/bench.py needs an NVIDIA GPU, torch sees none.\n"


def test_report_names_times_ratios_and_shares(bench: ModuleType) -> None:
    result = {
        "op": "attention",
        "variant": "fp8",
        "shape": "[2, 48]",
        "goal": "fast",
        "wrong": ["out with m64: RMS error"],
        "tilings_ms": {"m128": 40.0, "m64": 50.0},
        "worst_error": {"m128": 0.5, "m64": 0.25},
        "chosen": "m64",
        "baselines_ms": {"SDPA flash": 80.0, "SDPA cuDNN": "not to be had: no such backend"},
        "share_of_peak": {"H100": 0.9},
        "limit": "exponentials",
    }
    text = "\n".join(bench.lines(result))
    assert "WRONG: out with m64: RMS error" in text
    assert "40.000 ms  ours m128, error 0.50 of the bound\n" in text
    assert "50.000 ms  ours m64, error 0.25 of the bound  (production)" in text
    assert "SDPA flash: ours is 2.00 times as fast" in text
    assert "SDPA cuDNN not to be had" in text
    assert "90.0%  of the data-sheet peak of an H100 (exponentials)" in text
