"""The networks of perf.full_size at a small size on the CPU, where fused operators compute their formulas."""

import pytest
import torch

from perf.full_size import Measured, main, summary
from perf.full_size_networks import FusedWay, dit_step
from stepvideo_kernels.choice import Target
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.planning.model_size import PUBLISHED, workload

SMALL = DiTConfig(
    num_heads=2, num_layers=2, in_channels=8, out_channels=8, patch_size=1, llm_channels=64, clip_channels=32
)


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_fused_step_is_the_plain_one_but_for_rounding(precision: str) -> None:
    torch.manual_seed(0)
    make = dit_step(torch.device("cpu"), 2, SMALL)
    plain, fused = make(None)(), make(FusedWay(precision, Target(100, "tensorrt")))()
    assert len(plain) == len(fused) == 2
    for one, other in zip(plain, fused, strict=True):
        assert not torch.equal(one, other)
        assert (one - other).square().mean().sqrt() < 0.02 * one.square().mean().sqrt()


def test_seconds_of_a_request() -> None:
    stages = {"step_llm": 0.1, "vae_encoder": 0.02, "vae_decoder": 0.5, "dit step": 10.0}
    results = [Measured(stage, "torch", seconds, 1.0, 1.0, None) for stage, seconds in stages.items()]
    results.append(Measured("dit step", "fused", 8.0, 1.0, 1.0, 0.01))
    lines = summary(results, workload(PUBLISHED, VideoGeometry(102, 544, 992), 50), "NVIDIA H200")
    assert lines[0] == "text, image and 6 chunks, the faster way of each: 3.22 s"
    assert lines[1:3] == [
        "a request of 50 steps, torch: 503 s",
        "a request of 50 steps, fused: 403 s",
    ]
    assert lines[3].startswith("the planner for an H200 in bf16: 12.9")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["perf.full_size"])
    assert main() == 1
    assert capsys.readouterr().err == "error: perf.full_size needs an NVIDIA GPU, torch sees none.\n"
