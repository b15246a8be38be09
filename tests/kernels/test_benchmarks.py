"""The benchmark's cases at a tiny size: inputs, kernel, baselines and the check itself."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stepvideo_kernels.benchmarks import Case, Tensors, cases
from stepvideo_kernels.kernel_spec import FullSize, TileConfig
from stepvideo_kernels.ops import builds_of

TINY = FullSize(
    batch=2, heads=2, video_tokens=37, text_tokens=21, llm_tokens=19, llm_groups=1, vae_tokens=35, vae_channels=32
)
CPU = torch.device("cpu")
ALL = {f"{case.op}.{case.variant}": case for case in cases(TINY, CPU)}


@pytest.fixture(scope="module")
def bench(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_bench", root / "kernels" / "bench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen_tile(case: Case) -> TileConfig:
    return next(b.tile for b in builds_of(case.op, TINY) if (b.variant, b.sm, b.chosen) == (case.variant, 90, True))


@pytest.mark.parametrize("name", ALL)
def test_case_passes_its_own_check(name: str, bench: ModuleType) -> None:
    case = ALL[name]
    given = case.inputs(torch.Generator().manual_seed(5))
    assert bench.errors(case, given, chosen_tile(case)) == []


@pytest.mark.parametrize("name", ALL)
def test_check_notices_a_wrong_result(name: str, bench: ModuleType) -> None:
    case = ALL[name]
    given = case.inputs(torch.Generator().manual_seed(5))

    def off(tensors: Tensors, tile: TileConfig) -> Tensors:
        return {key: (value.float() * 1.2).to(value.dtype) for key, value in case.kernel(tensors, tile).items()}

    assert len(bench.errors(replace(case, kernel=off), given, chosen_tile(case))) > 0


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
        "chosen": "m64",
        "baselines_ms": {"SDPA flash": 80.0, "SDPA cuDNN": "not to be had: no such backend"},
        "share_of_peak": {"H100": 0.9},
        "limit": "exponentials",
    }
    text = "\n".join(bench.lines(result))
    assert "WRONG: out with m64: RMS error" in text
    assert "40.000 ms  ours m128\n" in text
    assert "50.000 ms  ours m64  (production)" in text
    assert "SDPA flash: ours is 2.00 times as fast" in text
    assert "SDPA cuDNN not to be had" in text
    assert "90.0%  of the data-sheet peak of an H100 (exponentials)" in text
