"""The public models: `ti2v` (decoupled: a response per step, then the result) and `ti2v_unary` (the result alone)."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from stepvideo_serve.assembly import describe, latent_channels
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import QueueFull
from stepvideo_serve.pipeline import Progress, Result, generate
from stepvideo_serve.request import GenerationRequest, parse_request
from stepvideo_serve.serving.adapter import (
    Sender,
    bytes_array,
    clear_setup_errors,
    end_process,
    error_response,
    read_inputs,
    response,
)
from stepvideo_serve.serving.bls import BlsStages
from stepvideo_serve.video.preview import encode_jpeg

HEARTBEAT_S = 15.0

Outputs = dict[str, np.ndarray[Any, Any]]


class PublicModel:
    """What both public models share."""

    def initialize(self, args: dict[str, str]) -> None:  # noqa: ARG002  # the signature is Triton's
        with clear_setup_errors():
            self._config = ServeConfig.from_environment()
            self._latent_channels = latent_channels(self._config)

    def finalize(self) -> None:
        end_process()

    def _parse(self, request: Any) -> GenerationRequest:
        return parse_request(read_inputs(request), self._config.limits, self._latent_channels)

    def _events(self, request: GenerationRequest, cancelled: Any) -> Iterator[Progress | Result]:
        stages = BlsStages(self._latent_channels, describe(self._config))
        return generate(request, stages, self._config.video, cancelled)


class UnaryModel(PublicModel):
    """`ti2v_unary`: one request at a time per instance."""

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            for event in self._events(self._parse(request), request.is_cancelled):
                if isinstance(event, Result):
                    return response(result_outputs(event))
            raise RuntimeError("the pipeline ended without a result")
        except Exception as error:  # every error becomes this request's response
            return error_response(error)


class StreamingModel(PublicModel):
    """`ti2v`: requests run side by side on threads; `dit_denoiser` lets one at a time at the ranks.

    A request is validated before it is accepted, so a bad one is answered at once however busy the server is.
    """

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        self._max_accepted = 1 + self._config.denoiser.max_queued
        self._accepted = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self._max_accepted, thread_name_prefix="ti2v")

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = Sender(request)
            try:
                parsed = self._parse(request)
                self._accept()
                self._threads.submit(self._run, parsed, sender)
            except Exception as error:  # every error becomes this request's response
                sender.fail(error)

    def finalize(self) -> None:
        self._threads.shutdown()
        super().finalize()

    def _accept(self) -> None:
        with self._lock:
            if self._accepted >= self._max_accepted:
                raise QueueFull(
                    f"At most {self._max_accepted} requests may run or wait, {self._accepted} do: try again later."
                )
            self._accepted += 1

    def _run(self, parsed: GenerationRequest, sender: Sender) -> None:
        try:
            with heartbeat(sender, parsed.steps) as beat:
                for event in self._events(parsed, sender.cancelled):
                    if isinstance(event, Progress):
                        beat.latest = progress_outputs(event)
                        sender.send({**beat.latest, **_preview_outputs(event)})
                        beat.sent.set()
                    else:
                        sender.send(result_outputs(event))
        except Exception as error:  # as above
            sender.fail(error)
        finally:
            with self._lock:
                self._accepted -= 1
            sender.close()


class Heartbeat:
    """The latest progress, repeated while nothing new comes."""

    def __init__(self, latest: Outputs) -> None:
        self.latest = latest
        self.sent = threading.Event()
        self.ended = False


@contextmanager
def heartbeat(sender: Sender, total_steps: int) -> Iterator[Heartbeat]:
    """Repeats the latest progress (step 0 at first) whenever 15 s pass without a response, so that a client can tell
    a slow stage or a queue from a dead server."""
    beat = Heartbeat(progress_outputs(Progress(0, total_steps, 0.0, None)))

    def repeat() -> None:
        while not beat.ended:
            if not beat.sent.wait(HEARTBEAT_S) and not beat.ended:
                sender.send(beat.latest)
            beat.sent.clear()

    thread = threading.Thread(target=repeat, name="heartbeat")
    thread.start()
    try:
        yield beat
    finally:
        beat.ended = True
        beat.sent.set()
        thread.join()


def progress_outputs(progress: Progress) -> Outputs:
    """STEP, TOTAL_STEPS, ELAPSED_S."""
    return {
        "STEP": np.array([progress.step], np.int32),
        "TOTAL_STEPS": np.array([progress.total_steps], np.int32),
        "ELAPSED_S": np.array([progress.elapsed_s], np.float32),
    }


def result_outputs(result: Result) -> Outputs:
    """VIDEO or FRAMES or LATENTS, then SEED and REPORT."""
    outputs: Outputs = {
        "SEED": np.array([result.seed], np.int64),
        "REPORT": bytes_array(json.dumps(result.report).encode()),
    }
    if result.video is not None:
        outputs["VIDEO"] = bytes_array(result.video)
    if result.frames is not None:
        outputs["FRAMES"] = result.frames
    if result.latents is not None:
        outputs["LATENTS"] = result.latents
    return outputs


def _preview_outputs(progress: Progress) -> Outputs:
    return {} if progress.preview is None else {"PREVIEW": bytes_array(encode_jpeg(progress.preview))}
