"""What runs in a rank process of `dit_denoiser`, and the messages between the model and its ranks.

The model's side of a message is numpy and JSON only, so that the Triton stub needs neither torch nor a GPU.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stepvideo_serve.assembly import Denoiser
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.parallel.worker import JobContext
from stepvideo_serve.sampling.job import DenoiseJob
from stepvideo_serve.text.states import TextStates

TensorMap = dict[str, NDArray[Any]]


def build_rank(settings: dict[str, Any]) -> "DenoiserRank":
    """The factory for `RankGroup`; settings["config"] is the path of serve.toml."""
    return DenoiserRank(ServeConfig.load(Path(settings["config"])))


class DenoiserRank:
    """Runs one denoising job at a time and reports every step."""

    def __init__(self, config: ServeConfig) -> None:
        self._denoiser = Denoiser(config)

    def info(self) -> dict[str, Any]:
        return {"engines": self._denoiser.engines}

    def run(self, params: dict[str, Any], tensors: TensorMap, context: JobContext) -> tuple[dict[str, Any], TensorMap]:
        """Reports step, total_steps, seconds (and a preview) after each step; returns the latents."""
        latents = None
        for done in self._denoiser.run(job_from_message(params, tensors)):
            latents = done.latents
            report = {"step": done.step, "total_steps": done.total_steps, "seconds": done.seconds}
            context.report(report, {} if done.preview is None else {"preview": done.preview})
            context.check_cancelled()
        if latents is None:
            raise InvalidRequest("STEPS must be at least 1, got none: ask for at least one step.")
        return {}, {"latents": latents.numpy()}


def job_from_message(params: dict[str, Any], tensors: TensorMap) -> DenoiseJob:
    """The job that `dit_denoiser` described. Raises InvalidRequest when a part is missing or does not fit."""

    def text(branch: str) -> TextStates | None:
        if f"{branch}_llm" not in tensors:
            return None
        return TextStates(llm=tensor(f"{branch}_llm", 2), clip=tensor(f"{branch}_clip", 2))

    def tensor(name: str, rank: int) -> torch.Tensor:
        if name not in tensors or tensors[name].ndim != rank or not np.isfinite(tensors[name]).all():
            found = tensors[name].shape if name in tensors else "none"
            raise InvalidRequest(f"{name.upper()} must be a finite tensor of {rank} dimensions, got {found}.")
        return torch.from_numpy(tensors[name])

    positive = text("positive")
    if positive is None:
        raise InvalidRequest("POSITIVE_LLM must hold the prompt's states, got none: call the model ti2v instead.")
    latents, condition = tensor("latents", 4), tensor("condition", 3)
    if latents.shape[1:] != condition.shape:
        raise InvalidRequest(
            f"CONDITION must be one frame of LATENTS {list(latents.shape)}, got {list(condition.shape)}."
        )
    return DenoiseJob(
        latents=latents,
        condition=condition,
        positive=positive,
        negative=text("negative"),
        steps=params["steps"],
        cfg_scale=params["cfg_scale"],
        time_shift=params["time_shift"],
        motion_score=params["motion_score"],
        preview_every=params["preview_every"],
        timeout_s=params["timeout_s"],
    )
