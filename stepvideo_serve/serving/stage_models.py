"""The models that hold one stage each. Only models of this server may call them (launch/boundary.py)."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from stepvideo_serve.assembly.on_gpus import stage_device
from stepvideo_serve.assembly.stages import ImageEncoder, build_frame_decoder, build_text_encoder
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.engine.device_errors import device_errors, require_context
from stepvideo_serve.errors import InvalidRequest, RequestCancelled
from stepvideo_serve.launch.boundary import Boundary
from stepvideo_serve.memory.placement import DECODER, SECTIONS
from stepvideo_serve.scheduling.progress import Repeated
from stepvideo_serve.scheduling.run_queue import QueuedRun, QueueRules, RunQueue, RunTerms
from stepvideo_serve.serving.adapter import (
    Arrays,
    Sender,
    clear_setup_errors,
    end_process,
    is_probe,
    parameters_of,
    read_inputs,
)
from stepvideo_serve.serving.observe.logs import configure_logging
from stepvideo_serve.serving.observe.metrics import CacheMetrics, Heartbeats, Metrics
from stepvideo_serve.serving.observe.thread_deaths import ThreadDeaths
from stepvideo_serve.serving.queued_model import QueuedModel
from stepvideo_serve.serving.remote_stages import RanksLLM
from stepvideo_serve.serving.stage_bounds import StageBounds, TensorBounds
from stepvideo_serve.serving.stage_work import CALL_ID, CANCEL_CALL, StageWork, Task


class StageModel(ABC):
    """A model that answers each request with one response, and probes at once. `internal`: to requests of this server's
    models only. Where the GPU is lost the process answers and ends."""

    internal = True

    def initialize(self, args: dict[str, str]) -> None:
        with clear_setup_errors():
            config = ServeConfig.from_environment()
            configure_logging(config.logging, args["model_name"], in_stub=True)
            self._name, self._boundary = args["model_name"], Boundary.from_environment()
            self._deaths, self.bounds = ThreadDeaths.watched(), StageBounds.of(config)
            self.metrics = Metrics()
            self._device = stage_device(config, self._name if self._name in SECTIONS else "")
            self.work = StageWork(self.answer, device=self._device)
            self.load(config)
            self._beats = Heartbeats(self.metrics, args["model_name"])

    def is_ready(self) -> bool:
        """Asked by servers from 26.03 on."""
        return self._deaths.none

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = Sender(request, decoupled=False)
            try:
                self._take(request, sender)
            except Exception as error:  # every error becomes this request's response
                sender.fail(error)

    def finalize(self) -> None:
        self._beats.close()
        end_process()

    @abstractmethod
    def load(self, config: ServeConfig) -> None:
        """Makes the model ready. Raises SetupError."""

    @abstractmethod
    def answer(self, inputs: Arrays) -> Arrays:
        """The outputs; called on the thread of `self.work`. Any exception becomes the request's error."""

    def _take(self, request: Any, sender: Sender) -> None:
        if is_probe(request):
            self._deaths.check(self._name)
            self.work.check(self._name)
            require_context("a probe asked", self._device)
            sender.finish({})
            return
        parameters = parameters_of(request)
        if self.internal:
            self._boundary.check(self._name, parameters)
            if CANCEL_CALL in parameters:
                self.work.cancel(str(parameters[CANCEL_CALL]))
                sender.finish({})
                return
        self.work.put(Task(read_inputs(request), sender, str(parameters.get(CALL_ID, ""))))


class TextEncoderModel(StageModel):
    """PROMPT -> LLM_STATES, CLIP_STATES, CACHED."""

    def load(self, config: ServeConfig) -> None:
        ranks = RanksLLM(self.work.cancelled, self.work.elsewhere)
        self._encoder = build_text_encoder(config, ranks if config.text.on_ranks else None)
        self._cache = CacheMetrics(self.metrics, "text")

    def answer(self, inputs: Arrays) -> Arrays:
        self.bounds.check_prompt(inputs["PROMPT"].flat[0])
        states, cached = self._encoder.encode(_text(inputs["PROMPT"]))
        self._cache.note(cached)
        return {"LLM_STATES": states.llm.numpy(), "CLIP_STATES": states.clip.numpy(), "CACHED": np.array([cached])}


class VaeEncoderModel(StageModel):
    """PIXELS, NOISE -> LATENT, CACHED."""

    def load(self, config: ServeConfig) -> None:
        self._encoder, self._tensors = ImageEncoder(config), TensorBounds.of(config.model.dir)
        self._cache = CacheMetrics(self.metrics, "image")

    def answer(self, inputs: Arrays) -> Arrays:
        self.bounds.check_pixels(inputs)
        self._tensors.check_latent("NOISE", inputs["NOISE"])
        pixels, noise = (torch.from_numpy(inputs[name]) for name in ("PIXELS", "NOISE"))
        if not (torch.isfinite(pixels).all() and torch.isfinite(noise).all()):
            raise InvalidRequest("PIXELS and NOISE must be finite, got NaN or infinite values: correct them.")
        latent, cached = self._encoder.encode(pixels, noise)
        self._cache.note(cached)
        return {"LATENT": latent.numpy(), "CACHED": np.array([cached])}


class VaeDecoderModel(QueuedModel):
    """latents -> frames, one response per chunk. A run stops after a chunk once it is cancelled. Where several ranks
    decode, this model holds nothing and takes no run."""

    def initialize(self, args: dict[str, str]) -> None:
        with clear_setup_errors():
            config = ServeConfig.from_environment()
            configure_logging(config.logging, args["model_name"], in_stub=True)
            self.prepare(args["model_name"], config)
            self._device = stage_device(config, DECODER)
            self._decoder = build_frame_decoder(config)
        self._beats = Heartbeats(Metrics(), args["model_name"])
        # No caller meets this bound: a request decodes only after `dit_denoiser` has accepted its run.
        self.queue = RunQueue(QueueRules(self.bounds.max_runs), self._serve, lambda: None, lambda _: None)

    def finalize(self) -> None:
        self._beats.close()
        super().finalize()

    def describe_run(self, inputs: Arrays) -> RunTerms:
        if "latents" not in inputs:
            raise InvalidRequest("A run needs latents, got none: call the model ti2v instead.")
        self.bounds.check_latents(inputs)
        self.tensor_bounds.check_latent("latents", inputs["latents"])
        return RunTerms(Repeated("decode", {"latents": inputs["latents"]}))

    def probed(self) -> Arrays:
        require_context("a probe asked", self._device)
        return {}

    def _serve(self, run: QueuedRun) -> bool:
        try:
            if self._decoder is None:
                raise InvalidRequest("This model decodes for one rank, here several ranks decode: call ti2v instead.")
            with device_errors(self._device):
                for frames in self._decoder.decode(torch.from_numpy(run.terms.job.tensors["latents"])):
                    if run.cancelled.is_set():
                        raise RequestCancelled("The request was cancelled by its caller.")
                    run.answer.send({"frames": frames})
        except Exception as error:  # as in StageModel
            run.answer.fail(error)
        run.answer.close()
        return True


def _text(array: Any) -> str:
    try:
        return str(array.flat[0].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"PROMPT must be UTF-8, byte {error.start} is not: encode the text again.") from None
