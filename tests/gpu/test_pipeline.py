"""The pipeline in torch on a GPU against the CPU, in this process and in a rank; on the toy-world checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepvideo_serve.assembly.stages import LocalStages
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.parallel.job import ResultEvent
from stepvideo_serve.sampling.job import DenoiseJob
from tests.mini import job_settings
from tests.serving.launch import EAGER, ranks

pytestmark = pytest.mark.gpu

PROMPT = "红色圆形向右移动。"
STEPS = 4
SHAPE = (6, 16, 4, 4)
FP32_END_TO_END = 1e-4  # of the largest magnitude: what export.verify allows


def config_of(root: Path, folder: Path, device: str, precision: str) -> Path:
    text = EAGER.format(model=root / "toyworld" / "checkpoint", layout="single")
    path = folder / f"{device}-{precision}.toml"
    path.write_text(text.replace("[model]", f'[model]\ndevice = "{device}"\nprecision = "{precision}"'))
    return path


def job_of(stages: LocalStages) -> DenoiseJob:
    generator = torch.Generator().manual_seed(3)
    shape = (SHAPE[0], stages.latent_channels, *SHAPE[2:])
    latents = torch.randn(shape, generator=generator)
    pixels = torch.rand(3, SHAPE[2] * 16, SHAPE[3] * 16, generator=generator) * 2 - 1
    condition = stages.encode_image(pixels, torch.zeros(shape[1:]))
    positive, negative = stages.encode_text(PROMPT), stages.encode_text("")
    return DenoiseJob(latents, condition, positive, negative, job_settings(STEPS, 4.0))


def run(stages: LocalStages, job: DenoiseJob) -> tuple[Tensor, Tensor]:
    """Latents and frames (as numbers)."""
    *_, done = stages.denoise(job, lambda: False)
    assert done.latents is not None
    frames = np.concatenate(list(stages.decode(done.latents)))
    return done.latents, torch.from_numpy(frames).float()


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(device, precision) -> latents and frames of one request; its inputs are those of the CPU in fp32."""
    folder = tmp_path_factory.mktemp("configs")
    found = {}
    job: DenoiseJob | None = None
    for device, precision in (("cpu", "fp32"), ("cpu", "bf16"), ("cuda", "fp32"), ("cuda", "bf16")):
        stages = LocalStages(ServeConfig.load(config_of(root, folder, device, precision)))
        own = job_of(stages)
        job = job or own
        found[device, precision] = run(stages, job)
        if (device, precision) == ("cuda", "fp32"):
            for name in ("condition", "positive", "negative"):
                close(getattr(own, name), getattr(job, name))
    return found


def close(found: Any, expected: Any) -> None:
    """Within what fp32 may lose from end to end."""
    if not isinstance(found, Tensor):
        for name in ("llm", "clip"):
            close(getattr(found, name), getattr(expected, name))
        return
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= FP32_END_TO_END, f"{error:.2e}"


def test_fp32_gives_what_the_cpu_gives(made: dict[tuple[str, str], tuple[Tensor, Tensor]]) -> None:
    (latents, frames), (expected, pictures) = made["cuda", "fp32"], made["cpu", "fp32"]
    close(latents, expected)
    assert (frames - pictures).abs().max() <= 1
    assert ((frames - pictures).abs() > 0).float().mean() <= 1e-3


def test_bf16_loses_no_more_than_twice_what_it_loses_on_the_cpu(
    made: dict[tuple[str, str], tuple[Tensor, Tensor]],
) -> None:
    exact = made["cpu", "fp32"][0]
    own, allowed = (((made[device, "bf16"][0] - exact).square().mean().sqrt()) for device in ("cuda", "cpu"))
    assert own <= 2 * allowed, f"{own:.2e}, on the CPU {allowed:.2e}"


def test_a_rank_gives_the_same_bits(
    root: Path, made: dict[tuple[str, str], tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    path = config_of(root, tmp_path, "cuda", "fp32")
    config = ServeConfig.load(path)
    job = job_of(LocalStages(replace(config, model=replace(config.model, device="cpu"))))
    tensors = {"latents": job.latents, "condition": job.condition}
    tensors |= {"positive_llm": job.positive.llm, "positive_clip": job.positive.clip}
    assert job.negative is not None
    tensors |= {"negative_llm": job.negative.llm, "negative_clip": job.negative.clip}
    params = {"kind": "denoise", "steps": STEPS, "cfg_scale": 4.0, "time_shift": 7.0, "motion_score": 5.0}
    params |= {"preview_every": 1, "timeout_s": None}
    with ranks(root, path, 1) as group:
        *_, last = group.run(params, {name: tensor.numpy() for name, tensor in tensors.items()})
    assert isinstance(last, ResultEvent)
    assert torch.equal(torch.from_numpy(last.tensors["latents"]), made["cuda", "fp32"][0])
