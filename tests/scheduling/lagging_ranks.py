"""Ranks on CPUs that look at a step when the next one has been computed, as ranks on GPUs do; imported by the rank
processes."""

from typing import Any

import torch

from stepvideo_serve.assembly.denoiser_rank import DenoiserRank
from stepvideo_serve.sampling import job
from stepvideo_serve.serving.rank_factory import build_rank


def one_behind(settings: dict[str, Any]) -> DenoiserRank:
    setattr(job, "steps_behind", _one)  # noqa: B010  # in the place of a function
    return build_rank(settings)


def _one(_: torch.device) -> int:
    return 1
