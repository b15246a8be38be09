"""What runs in a rank process of `dit_denoiser`, and the messages between the model and its ranks.

The model's side of a message is numpy and JSON only, so that the Triton stub needs neither torch nor a GPU.
All ranks run the same jobs in lock-step. At each step boundary the leader decides for all whether to go on, so that a
cancel, a deadline or a value that is not finite ends the job on every rank after the same step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.runners import build_sharded_llm
from stepvideo_serve.assembly.stages import Denoiser, ShardedDecoder, ShardedDenoiser
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import ConfigError, DeadlineExceeded, EngineError, InvalidRequest, RequestCancelled
from stepvideo_serve.parallel.collectives import Collectives
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.parallel.rank_process import JobContext
from stepvideo_serve.pipeline.output_checks import is_finite, not_finite
from stepvideo_serve.sampling.job import DenoiseJob
from stepvideo_serve.text.states import TextStates

TensorMap = dict[str, NDArray[Any]]
Outcome = tuple[dict[str, Any], TensorMap]
GoOn = Callable[[str, torch.Tensor | None], None]

GO_ON, CANCELLED, TOO_LATE, NOT_FINITE = range(4)


class DenoiserRank:
    """One rank: denoises, and decodes its share of the chunks. Jobs are told apart by params["kind"]."""

    def __init__(self, config: ServeConfig, layout: Layout, rank: int) -> None:
        self._layout, self._rank = layout, rank
        self._denoiser: Denoiser | ShardedDenoiser
        self._collectives: Collectives | None = None
        self._decoder: ShardedDecoder | None = None
        self._busy_s = 0.0
        if layout.world_size == 1:
            self._denoiser = Denoiser(config)
        else:
            self._collectives = Collectives(layout, rank)
            self._denoiser = ShardedDenoiser(config, layout, self._collectives)
            self._decoder = ShardedDecoder(config, self._collectives, rank, layout.world_size)
        self._llm = None
        self._device = config.model.device
        self._vocab_size = Checkpoint(config.model.dir).llm_config.vocab_size
        if config.text.on_ranks:
            if self._collectives is None:
                raise ConfigError("[text] on_ranks needs a layout of several ranks, got one: set it to false.")
            self._llm = build_sharded_llm(config, layout, self._collectives)

    def info(self) -> dict[str, Any]:
        return {"engines": self._denoiser.engines, "layout": str(self._layout)}

    def run(self, params: dict[str, Any], tensors: TensorMap, context: JobContext) -> Outcome:
        """Runs a "denoise", "decode" or "text" job. Raises a RequestError on all ranks together."""
        began_s = time.monotonic()

        def go_on(where: str, latents: torch.Tensor | None) -> None:
            self._raise_together(_verdict(context, params["timeout_s"], began_s, latents), where)
            context.mark_step()  # behind the agreement: a rank without a chunk to decode waits there for the others

        try:
            if params["kind"] == "decode":
                with self._busy():
                    return self._decode(tensors, context, go_on)
            if params["kind"] == "text":
                with self._busy():
                    return {}, {"llm_states": self._encode(tensors["input_ids"])}
            return self._denoise(job_from_message(params, tensors), context, go_on)
        except EngineError as error:  # shapes that no graph takes: every rank finds them at the same place
            raise InvalidRequest(f"The tensors must fit the graphs, they do not: {error}") from None

    def _denoise(self, job: DenoiseJob, context: JobContext, go_on: GoOn) -> Outcome:
        """Reports step, total_steps, seconds and latents (and a preview) after each step; returns the latents, and
        rank_seconds: see _rank_seconds."""
        with self._busy():
            latents = self._steps(job, context, go_on)
        return {"rank_seconds": self._rank_seconds()}, {"latents": latents.numpy()}

    def _steps(self, job: DenoiseJob, context: JobContext, go_on: GoOn) -> torch.Tensor:
        latents = job.latents
        for done in self._denoiser.run(job):
            latents = latents if done.latents is None else done.latents
            report = {"step": done.step, "total_steps": done.total_steps, "seconds": done.seconds}
            preview = {} if done.preview is None else {"preview": done.preview}
            context.report(report, {"latents": latents.numpy(), **preview})
            if done.step < done.total_steps:
                go_on(f"after step {done.step} of {done.total_steps}", latents)
        return latents

    @contextmanager
    def _busy(self) -> Iterator[None]:
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._busy_s += time.monotonic() - began_s

    def _rank_seconds(self) -> dict[str, list[float]]:
        """Since the last report, by rank: "busy" with jobs of any kind, and of these waiting in "communication". What
        was spent on a job that ended early, or on decoding, counts with the next report."""
        busy_s, self._busy_s = self._busy_s, 0.0
        if self._collectives is None:
            return {"busy": [busy_s], "communication": [0.0]}
        ranks = self._collectives.from_all([busy_s, self._collectives.clock.take()])
        return {"busy": [busy for busy, _ in ranks], "communication": [waited for _, waited in ranks]}

    def _decode(self, tensors: TensorMap, context: JobContext, go_on: GoOn) -> Outcome:
        """Reports frames uint8 [n, H, W, 3] chunk by chunk."""
        if self._decoder is None:
            raise InvalidRequest("Only several ranks decode, this layout has one: call the model vae_decoder instead.")
        for frames in self._decoder.decode(_tensor(tensors, "latents", 4), lambda: go_on("while decoding", None)):
            context.report({}, {"frames": frames})
        return {}, {}

    def _encode(self, input_ids: NDArray[Any]) -> NDArray[np.float32]:
        """Token ids int64 [1, L] -> states fp32 [1, L, D]."""
        if self._llm is None:
            raise InvalidRequest("Step-LLM does not run on the ranks ([text] on_ranks): call text_encoder instead.")
        if input_ids.min() < 0 or input_ids.max() >= self._vocab_size:
            raise InvalidRequest(f"INPUT_IDS must be from 0 to {self._vocab_size - 1}, got others: call ti2v instead.")
        on_device = self._llm(torch.from_numpy(input_ids).to(self._device))["llm_states"]
        states: NDArray[np.float32] = on_device.float().cpu().numpy()
        return states

    def _raise_together(self, verdict: int, where: str) -> None:
        """The leader's verdict holds on all ranks."""
        if self._collectives is not None:
            verdict = self._collectives.agree(verdict)
        if verdict != GO_ON:
            _end(verdict, where)


def _verdict(context: JobContext, timeout_s: float | None, began_s: float, latents: torch.Tensor | None) -> int:
    if context.cancelled():
        return CANCELLED
    if latents is not None and not is_finite(latents):
        return NOT_FINITE
    return TOO_LATE if timeout_s is not None and time.monotonic() - began_s > timeout_s else GO_ON


def _end(verdict: int, where: str) -> NoReturn:
    if verdict == CANCELLED:
        raise RequestCancelled("The request was cancelled by its caller.")
    if verdict == NOT_FINITE:
        raise not_finite(where)
    raise DeadlineExceeded(
        f"The video must be ready within TIMEOUT_S, which ran out {where}: ask for fewer steps or frames, or allow "
        "more time."
    )


def job_from_message(params: dict[str, Any], tensors: TensorMap) -> DenoiseJob:
    """The job that `dit_denoiser` described. Raises InvalidRequest when a part is missing or does not fit."""
    positive = _text(tensors, "positive")
    if positive is None:
        raise InvalidRequest("POSITIVE_LLM must hold the prompt's states, got none: call the model ti2v instead.")
    latents, condition = _tensor(tensors, "latents", 4), _tensor(tensors, "condition", 3)
    if latents.shape[1:] != condition.shape:
        raise InvalidRequest(
            f"CONDITION must be one frame of LATENTS {list(latents.shape)}, got {list(condition.shape)}."
        )
    return DenoiseJob(
        latents=latents,
        condition=condition,
        positive=positive,
        negative=_text(tensors, "negative"),
        steps=params["steps"],
        cfg_scale=params["cfg_scale"],
        time_shift=params["time_shift"],
        motion_score=params["motion_score"],
        preview_every=params["preview_every"],
        start_step=params.get("start_step", 0),
    )


def _text(tensors: TensorMap, branch: str) -> TextStates | None:
    if f"{branch}_llm" not in tensors:
        return None
    return TextStates(llm=_tensor(tensors, f"{branch}_llm", 2), clip=_tensor(tensors, f"{branch}_clip", 2))


def _tensor(tensors: TensorMap, name: str, dimensions: int) -> torch.Tensor:
    """The finite tensor of that many dimensions. Raises InvalidRequest."""
    if name not in tensors or tensors[name].ndim != dimensions or not np.isfinite(tensors[name]).all():
        found = tensors[name].shape if name in tensors else "none"
        raise InvalidRequest(f"{name.upper()} must be a finite tensor of {dimensions} dimensions, got {found}.")
    return torch.from_numpy(tensors[name])
