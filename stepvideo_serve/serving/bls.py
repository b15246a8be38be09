"""The stages of the pipeline as calls to the server's other models (Business Logic Scripting)."""

import json
import threading
import uuid
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from torch import Tensor

from stepvideo_serve.errors import RequestError, WorkerFailed
from stepvideo_serve.pipeline import Cancelled, Frames, Waiting
from stepvideo_serve.sampling.job import DenoiseJob, StepDone
from stepvideo_serve.serving.adapter import Arrays, bytes_array
from stepvideo_serve.text.states import TextStates

CANCEL_POLL_S = 0.05
CANCEL_AGAIN_S = 1.0


class BlsStages:
    """One request's way through the models of this server."""

    def __init__(
        self, latent_channels: int, description: dict[str, Any], cancelled: Cancelled, ranks_decode: bool, priority: int
    ) -> None:
        self.latent_channels = latent_channels
        self._description = description
        self._cancelled = cancelled
        self._ranks_decode = ranks_decode
        self._priority = priority

    def encode_text(self, prompt: str) -> TextStates:
        out = call("text_encoder", {"PROMPT": bytes_array(prompt.encode())}, ("LLM_STATES", "CLIP_STATES"))
        return TextStates(llm=torch.from_numpy(out["LLM_STATES"]), clip=torch.from_numpy(out["CLIP_STATES"]))

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        out = call("vae_encoder", {"PIXELS": pixels.numpy(), "NOISE": noise.numpy()}, ("LATENT",))
        return torch.from_numpy(out["LATENT"])

    def denoise(self, job: DenoiseJob, cancelled: Cancelled) -> Iterator[StepDone | Waiting]:
        """The last step is held back until its latents are there."""
        last: StepDone | None = None
        latents: Tensor | None = None
        with closing(
            run("dit_denoiser", {**_job_inputs(job), "PRIORITY": np.array([self._priority], np.int32)}, cancelled)
        ) as responses:
            for out in responses:
                if "LATENTS" in out:
                    latents = torch.from_numpy(out["LATENTS"])
                    self._description |= json.loads(out["REPORT"].flat[0])
                    continue
                if "QUEUE_POSITION" in out:
                    yield _waiting(out)
                    continue
                step = _step_done(out)
                if step.step < step.total_steps:
                    yield step
                else:
                    last = step
        if last is None or latents is None:
            raise WorkerFailed("dit_denoiser must answer with latents, it ended without them: see the server's log.")
        yield replace(last, latents=latents)

    def decode(self, latents: Tensor) -> Iterator[Frames]:
        inputs: dict[str, np.ndarray[Any, Any]] = {"LATENTS": latents.numpy()}
        model = "vae_decoder"
        if self._ranks_decode:
            model, inputs["KIND"] = "dit_denoiser", bytes_array(b"decode")
        with closing(run(model, inputs, self._cancelled)) as responses:
            for out in responses:
                yield out["FRAMES"]

    def describe(self) -> dict[str, Any]:
        return dict(self._description)


class RanksLLM:
    """Step-LLM on the ranks of `dit_denoiser`, called like the graph `step_llm`."""

    def __call__(self, input_ids: Tensor) -> dict[str, Tensor]:
        """input_ids [1, L] int64 -> {"llm_states": [1, L, D]}."""
        inputs = {"KIND": bytes_array(b"text"), "INPUT_IDS": input_ids.numpy()}
        with closing(run("dit_denoiser", inputs, lambda: False)) as responses:
            for out in responses:
                return {"llm_states": torch.from_numpy(out["LLM_STATES"])}
        raise WorkerFailed("dit_denoiser must answer with text states, it ended without: see the server's log.")


def call(model: str, inputs: Arrays, outputs: tuple[str, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """One request, one response. Raises the RequestError that the model answered with."""
    return _read(_request(model, inputs, outputs).exec())


def run(model: str, inputs: Arrays, cancelled: Cancelled) -> Generator[dict[str, np.ndarray[Any, Any]], None, None]:
    """One run of a decoupled model, its responses in turn. Raises the RequestError that the model answered with.

    `cancelled()` ends the run, and so does closing the generator early. Either way every response is taken: one that
    is left stays in the server for good, which then cannot unload the calling model.
    """
    run_id = bytes_array(uuid.uuid4().hex.encode())
    responses: Any = ()
    try:
        with cancelling(model, run_id, cancelled):
            responses = _request(model, {**inputs, "RUN_ID": run_id}, ()).exec(decoupled=True)  # until there is one
            for response in responses:
                if outputs := _read(response):
                    yield outputs
    finally:
        for _ in responses:
            continue


@contextmanager
def cancelling(model: str, run_id: np.ndarray[Any, Any], cancelled: Cancelled) -> Iterator[None]:
    """While the block runs, a cancel of the public request becomes one of the model's run; leaving the block by an
    exception ends the run too."""
    left = threading.Event()

    def cancel_run() -> None:
        for _ in _request(model, {"CANCEL_RUN": run_id}, ()).exec(decoupled=True):
            continue

    def watch() -> None:
        pause_s = CANCEL_POLL_S
        while not left.wait(pause_s):
            if cancelled():
                cancel_run()
                pause_s = CANCEL_AGAIN_S  # in case it was there before the run

    watcher = threading.Thread(target=watch, name="cancel-watch")
    watcher.start()
    try:
        yield
    except BaseException:
        cancel_run()
        raise
    finally:
        left.set()
        watcher.join()


def _request(model: str, inputs: Arrays, outputs: tuple[str, ...]) -> Any:
    return pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
    )


def _read(response: Any) -> dict[str, np.ndarray[Any, Any]]:
    if response.has_error():
        raise error_from_text(response.error().message())
    outputs = {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}
    if "ERROR" in outputs:
        raise error_from_text(outputs["ERROR"].flat[0].decode())
    return outputs


def error_from_text(message: str) -> RequestError:
    """The RequestError of a "CODE: sentence"; anything else was not sent by our models and is INTERNAL."""
    code, _, sentence = message.partition(": ")
    for kind in RequestError.__subclasses__():
        if kind.code == code:
            return kind(sentence)
    return WorkerFailed(f"A model of this server failed: {message.splitlines()[0] if message else 'no message'}")


def _job_inputs(job: DenoiseJob) -> dict[str, np.ndarray[Any, Any]]:
    inputs: dict[str, np.ndarray[Any, Any]] = {
        "LATENTS": job.latents.float().numpy(),
        "CONDITION": job.condition.numpy(),
        "POSITIVE_LLM": job.positive.llm.numpy(),
        "POSITIVE_CLIP": job.positive.clip.numpy(),
        "STEPS": np.array([job.steps], np.int32),
        "CFG_SCALE": np.array([job.cfg_scale], np.float32),
        "TIME_SHIFT": np.array([job.time_shift], np.float32),
        "MOTION_SCORE": np.array([job.motion_score], np.float32),
        "PREVIEW_EVERY": np.array([job.preview_every], np.int32),
    }
    if job.negative is not None:
        inputs |= {"NEGATIVE_LLM": job.negative.llm.numpy(), "NEGATIVE_CLIP": job.negative.clip.numpy()}
    if job.timeout_s is not None:
        inputs["TIMEOUT_S"] = np.array([job.timeout_s], np.float32)
    return inputs


def _waiting(out: Arrays) -> Waiting:
    start_in_s = float(out["START_IN_S"].flat[0])
    return Waiting(int(out["QUEUE_POSITION"].flat[0]), start_in_s if start_in_s >= 0 else None)


def _step_done(out: Arrays) -> StepDone:
    step, total, seconds = (out[name].flat[0] for name in ("STEP", "TOTAL_STEPS", "STEP_SECONDS"))
    return StepDone(int(step), int(total), float(seconds), out.get("PREVIEW"), None)
