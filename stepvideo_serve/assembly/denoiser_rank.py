"""What runs in a rank process of `dit_denoiser`, and the messages between the model and its ranks.

The model's side of a message is numpy and JSON only, so that the Triton stub needs neither torch nor a GPU.
All ranks run the same jobs in lock-step. At each step boundary the leader decides for all whether to go on, so that a
cancel, a deadline or a value that is not finite ends the job on every rank after the same step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.engines import largest_sizes
from stepvideo_serve.assembly.runners import build_sharded_llm
from stepvideo_serve.assembly.stages import Denoiser, ShardedDecoder
from stepvideo_serve.assembly.warm_up import warm_up
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.engine.device_errors import device_errors
from stepvideo_serve.errors import ConfigError, DeadlineExceeded, EngineError, InvalidRequest, RequestCancelled
from stepvideo_serve.parallel.collectives import Collectives, communicator_errors
from stepvideo_serve.parallel.first_contact import connect
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.parallel.rank_process import JobContext
from stepvideo_serve.pipeline.output_checks import is_finite, not_finite
from stepvideo_serve.sampling.job import DenoiseJob, finite_tensor
from stepvideo_serve.text.segments import ShardedStepLLM

TensorMap = dict[str, NDArray[Any]]
Outcome = tuple[dict[str, Any], TensorMap]
GoOn = Callable[[str, torch.Tensor | None], None]

GO_ON, CANCELLED, TOO_LATE, NOT_FINITE = range(4)


class DenoiserRank:
    """One rank: denoises, and decodes its share of the chunks. Jobs are told apart by params["kind"]."""

    def __init__(self, config: ServeConfig, layout: Layout, rank: int) -> None:
        self._layout, self._presets = layout, config.presets
        self._collectives = _connected(config, layout, rank) if layout.world_size > 1 else None
        self._denoiser = Denoiser(config, layout, self._collectives)
        runners = dict(self._denoiser.runners)
        self._decoder: ShardedDecoder | None = None
        if self._collectives is not None:
            self._decoder = ShardedDecoder(config, self._collectives, rank, layout.world_size)
            runners |= self._decoder.runners
        self._busy_s = 0.0
        self._llm: ShardedStepLLM | None = None
        self._device = config.model.device
        self._vocab_size = Checkpoint(config.model.dir).llm_config.vocab_size
        if config.text.on_ranks:
            if self._collectives is None:
                raise ConfigError("[text] on_ranks needs a layout of several ranks, got one: set it to false.")
            self._llm, of_llm = build_sharded_llm(config, layout, self._collectives)
            runners |= of_llm
        warm_up(runners, rank, partial(largest_sizes, config) if config.model.device == "cuda" else None)

    def info(self) -> dict[str, Any]:
        return {"engines": self._denoiser.engines, "layout": str(self._layout)}

    def run(self, params: dict[str, Any], tensors: TensorMap, context: JobContext) -> Outcome:
        """Runs a "denoise", "decode" or "text" job. Raises a RequestError on all ranks together, and DeviceLost where
        this rank can run no other."""
        began_s = time.monotonic()

        def go_on(where: str, latents: torch.Tensor | None) -> None:
            self._raise_together(_verdict(context, params["timeout_s"], began_s, latents), where)
            context.mark_step()  # behind the agreement: a rank without a chunk to decode waits there for the others

        with communicator_errors(), device_errors():
            with self._busy():
                if params["kind"] == "decode":
                    return self._decode(tensors, context, go_on)
                if params["kind"] == "text":
                    return {}, {"llm_states": self._encode(tensors["input_ids"])}
                result = self._denoise(DenoiseJob.from_message(params, tensors, self._presets), context, go_on)
            return {"settings": params["settings"], "rank_seconds": self._rank_seconds()}, result

    def _denoise(self, job: DenoiseJob, context: JobContext, go_on: GoOn) -> TensorMap:
        """Reports step, total_steps, seconds, evaluated, guided, evaluations and latents after each step, with a
        preview where one is due and with the state of a loop that forecasts; returns the latents."""
        _refuse_misfits(lambda: self._denoiser.check(job))
        latents, reported = job.latents, set[str]()
        for done in self._denoiser.run(job):
            latents = latents if done.latents is None else done.latents
            told = ("step", "total_steps", "seconds", "evaluated", "guided", "evaluations")
            report: dict[str, Any] = {name: getattr(done, name) for name in told}
            tensors = {"latents": latents.numpy()} | ({} if done.preview is None else {"preview": done.preview})
            if done.state is not None and done.state.history.velocities:
                velocities = done.state.tensors()
                report["state"] = {**done.state.scalars(), "tensors": list(velocities)}
                tensors |= {name: velocities[name].numpy() for name in velocities.keys() - reported}
                reported = set(velocities)
            context.report(report, tensors)
            if done.step < done.total_steps:
                go_on(f"after step {done.step} of {done.total_steps}", latents)
        return {"latents": latents.numpy()}

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
        decoder, latents = self._decoder, finite_tensor(tensors, "latents", 4)
        _refuse_misfits(lambda: decoder.check(latents))
        for frames in decoder.decode(latents, lambda: go_on("while decoding", None)):
            context.report({}, {"frames": frames})
        return {}, {}

    def _encode(self, input_ids: NDArray[Any]) -> NDArray[np.float32]:
        """Token ids int64 [1, L] -> states fp32 [1, L, D]."""
        if self._llm is None:
            raise InvalidRequest("Step-LLM does not run on the ranks ([text] on_ranks): call text_encoder instead.")
        llm = self._llm
        _refuse_misfits(lambda: llm.check(input_ids.shape))
        if input_ids.min() < 0 or input_ids.max() >= self._vocab_size:
            raise InvalidRequest(f"INPUT_IDS must be from 0 to {self._vocab_size - 1}, got others: call ti2v instead.")
        on_device = llm(torch.from_numpy(input_ids).to(self._device))["llm_states"]
        states: NDArray[np.float32] = on_device.float().cpu().numpy()
        return states

    def _raise_together(self, verdict: int, where: str) -> None:
        """The leader's verdict holds on all ranks."""
        if self._collectives is not None:
            verdict = self._collectives.agree(verdict)
        if verdict != GO_ON:
            _end(verdict, where)


def _refuse_misfits(check: Callable[[], None]) -> None:
    """Asks, before anything runs, whether the graphs take the tensors. Raises InvalidRequest, on all ranks alike; from
    then on an EngineError is nothing that the caller did."""
    try:
        check()
    except EngineError as error:
        raise InvalidRequest(f"The tensors must fit the graphs, they do not: {error}") from None


def _connected(config: ServeConfig, layout: Layout, rank: int) -> Collectives:
    """A communicator whose groups have been tried: before the graphs are loaded, which takes minutes, and on some ranks
    longer than on others."""
    ranks = Collectives(layout, rank)
    on_gpu = config.model.device == "cuda"
    connect(ranks, layout, rank, torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))
    return ranks


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
