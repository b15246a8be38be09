"""The stages of the pipeline as calls to the server's other models (Business Logic Scripting)."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepvideo_serve.errors import RequestError, WorkerFailed
from stepvideo_serve.pipeline.generate import Cancelled, Frames
from stepvideo_serve.planning.quote import stage_work
from stepvideo_serve.request import GenerationRequest
from stepvideo_serve.request.presets import Preset
from stepvideo_serve.sampling.job import DenoiseJob, StepDone
from stepvideo_serve.scheduling.run_queue import Waiting
from stepvideo_serve.serving.adapter import Arrays, bytes_array
from stepvideo_serve.serving.model_calls import Outputs, call, call_until, in_time, run
from stepvideo_serve.serving.observe.traces import UNKNOWN, Origin
from stepvideo_serve.text.states import TextStates

NOTE_S = 1.0  # how long a finished request waits for `dit_denoiser`, whose process may have died meanwhile

_logger = logging.getLogger(__name__)


class BlsStages:
    """One request's way through the models of this server."""

    def __init__(
        self,
        latent_channels: int,
        presets: Mapping[str, Preset],
        description: dict[str, Any],
        cancelled: Cancelled,
        ranks_decode: bool,
        priority: int,
        origin: Callable[[], Origin] = lambda: UNKNOWN,
    ) -> None:
        self._origin = origin
        self.latent_channels, self.presets = latent_channels, presets
        self._description = description
        self._cancelled = cancelled
        self._ranks_decode = ranks_decode
        self._priority = priority
        # REPORT must not have these: callers would learn whether somebody else has used their prompt or image.
        self.image_is_new = True
        """Whether the image's latent was computed."""
        self.new_tokens = 0
        """Tokens of the prompts that were not in the cache."""

    def encode_text(self, prompt: str) -> TextStates:
        """Raises RequestCancelled, also while the ranks that encode are started anew."""
        inputs, outputs = {"PROMPT": bytes_array(prompt.encode())}, ("LLM_STATES", "CLIP_STATES", "CACHED")
        out = call_until("text_encoder", inputs, outputs, self._cancelled, self._origin())
        self.new_tokens += 0 if out["CACHED"].flat[0] else len(out["LLM_STATES"])
        return TextStates(llm=torch.from_numpy(out["LLM_STATES"]), clip=torch.from_numpy(out["CLIP_STATES"]))

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        inputs = {"PIXELS": pixels.numpy(), "NOISE": noise.numpy()}
        out = call("vae_encoder", inputs, ("LATENT", "CACHED"), self._origin())
        self.image_is_new = not out["CACHED"].flat[0]
        return torch.from_numpy(out["LATENT"])

    def denoise(self, job: DenoiseJob, cancelled: Cancelled) -> Iterator[StepDone | Waiting]:
        """The steps of the job; the last one comes together with its latents."""
        last: StepDone | None = None
        latents: Tensor | None = None
        evaluations = 0
        inputs = _job_inputs(job, self._priority)
        with closing(run("dit_denoiser", inputs, cancelled, self._origin())) as responses:
            for out in responses:
                if "latents" in out:
                    latents = torch.from_numpy(out["latents"])
                    self._description |= json.loads(out["REPORT"].flat[0])
                    continue
                if "QUEUE_POSITION" in out:
                    yield _waiting(out)
                    continue
                step = _step_done(out, evaluations)
                evaluations = step.evaluations or 0
                if step.step < step.total_steps:
                    yield step
                else:
                    last = step
        if last is None or latents is None:
            raise WorkerFailed("dit_denoiser must answer with latents, it ended without them: see the server's log.")
        yield replace(last, latents=latents)

    def decode(self, latents: Tensor) -> Iterator[Frames]:
        inputs: Outputs = {"latents": latents.numpy()}
        model = "vae_decoder"
        if self._ranks_decode:
            model, inputs["KIND"] = "dit_denoiser", bytes_array(b"decode")
        with closing(run(model, inputs, self._cancelled, self._origin())) as responses:
            for out in responses:
                yield out["frames"]

    def describe(self) -> dict[str, Any]:
        return dict(self._description)


class RanksLLM:
    """Step-LLM on the ranks of `dit_denoiser`, called like the graph `step_llm`.

    cancelled  whether nobody wants the states any more, asked while they are computed or the ranks are started anew
    waiting    entered while another process works
    """

    def __init__(self, cancelled: Cancelled, waiting: Callable[[], AbstractContextManager[None]]) -> None:
        self._cancelled, self._waiting = cancelled, waiting

    def __call__(self, input_ids: Tensor) -> dict[str, Tensor]:
        """input_ids [1, L] int64 -> {"llm_states": [1, L, D]}. Raises RequestCancelled, and what `run` raises."""
        inputs = {"KIND": bytes_array(b"text"), "input_ids": input_ids.numpy()}
        with self._waiting(), closing(run("dit_denoiser", inputs, self._cancelled)) as responses:
            for out in responses:
                return {"llm_states": torch.from_numpy(out["llm_states"])}
        raise WorkerFailed("dit_denoiser must answer with text states, it ended without: see the server's log.")


def report_pace(request: GenerationRequest, seconds: Mapping[str, float], stages: BlsStages, decoders: int) -> None:
    """Tells `dit_denoiser` how long the stages of a finished request took. It measures denoising steps itself."""
    work = stage_work(request, stages.new_tokens, stages.image_is_new, decoders)
    note = {stage: (amount, seconds[stage]) for stage, amount in work.items() if stage in seconds}
    inputs = {"KIND": bytes_array(b"note"), "NOTE": bytes_array(json.dumps(note).encode())}
    try:
        in_time(lambda: call("dit_denoiser", inputs, ()), NOTE_S)
    except (TimeoutError, RequestError) as error:  # the video is made all the same
        _logger.warning("the pace of a request was not noted: %s", str(error) or type(error).__name__)


def _job_inputs(job: DenoiseJob, priority: int) -> Outputs:
    """The job's message as inputs of `dit_denoiser`: tensors under their names, settings as JSON."""
    params, tensors = job.message()
    inputs = {
        **tensors,
        "KIND": bytes_array(params["kind"].encode()),
        "SETTINGS": bytes_array(json.dumps(params["settings"]).encode()),
        "PRIORITY": np.array([priority], np.int32),
    }
    return inputs if job.timeout_s is None else {**inputs, "TIMEOUT_S": np.array([job.timeout_s], np.float32)}


def _waiting(out: Arrays) -> Waiting:
    start_in_s = float(out["START_IN_S"].flat[0]) if "START_IN_S" in out else None
    return Waiting(int(out["QUEUE_POSITION"].flat[0]), start_in_s)


def _step_done(out: Arrays, before: int) -> StepDone:
    """`before`: evaluations until this step."""
    step, total, evaluations = (int(out[name].flat[0]) for name in ("STEP", "TOTAL_STEPS", "EVALUATIONS"))
    seconds, preview = float(out["STEP_SECONDS"].flat[0]), out.get("preview")
    return StepDone(step, total, seconds, preview, None, evaluations > before, evaluations)
