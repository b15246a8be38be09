"""The model `dit_denoiser`: takes denoising runs, queues them, and drives the group of ranks that computes them.

A run is answered with a response per step, then LATENTS.
"""

import json
import os
from typing import Any

import numpy as np

from stepvideo_serve.config import ENVIRONMENT_VARIABLE, ServeConfig
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.parallel.group import RankGroup, ResultEvent
from stepvideo_serve.serving.adapter import Arrays, bytes_array, clear_setup_errors
from stepvideo_serve.serving.queued import QueuedModel
from stepvideo_serve.serving.run_queue import QueuedRun, RunQueue

RANK_FACTORY = "stepvideo_serve.serving.rank:build_rank"
TENSORS = ("LATENTS", "CONDITION", "POSITIVE_LLM", "POSITIVE_CLIP", "NEGATIVE_LLM", "NEGATIVE_CLIP")
REQUIRED_SCALARS = ("STEPS", "CFG_SCALE", "TIME_SHIFT", "MOTION_SCORE")


class DenoiserModel(QueuedModel):
    """Owns the queue and the ranks. The ranks are child processes: what kills one never kills this model."""

    def initialize(self, args: dict[str, str]) -> None:  # noqa: ARG002  # the signature is Triton's
        with clear_setup_errors():
            config = ServeConfig.from_environment()
            self._max_steps = config.limits.max_steps
            self._group = RankGroup(
                RANK_FACTORY,
                {"config": os.environ[ENVIRONMENT_VARIABLE]},
                start_timeout_s=config.denoiser.start_timeout_s,
                arena_bytes=config.denoiser.arena_mib << 20,
                threads_per_rank=config.denoiser.threads or os.cpu_count(),
            )
            self._group.start()
        self.queue = RunQueue(config.denoiser.max_queued, self._serve, self._group.cancel)

    def describe_run(self, inputs: Arrays) -> dict[str, Any]:
        missing = [name for name in REQUIRED_SCALARS if name not in inputs]
        if missing:
            raise InvalidRequest(f"A run needs {missing[0]}, got none: call the model ti2v instead.")
        steps = int(inputs["STEPS"].flat[0])
        if not 1 <= steps <= self._max_steps:
            raise InvalidRequest(f"STEPS must be 1 to {self._max_steps}, got {steps}: ask for fewer.")
        return {
            "steps": steps,
            "cfg_scale": _finite(inputs, "CFG_SCALE"),
            "time_shift": _finite(inputs, "TIME_SHIFT"),
            "motion_score": _finite(inputs, "MOTION_SCORE"),
            "preview_every": int(inputs["PREVIEW_EVERY"].flat[0]) if "PREVIEW_EVERY" in inputs else 0,
            "timeout_s": _finite(inputs, "TIMEOUT_S") if "TIMEOUT_S" in inputs else None,
        }

    def finalize(self) -> None:
        self.queue.close()
        self._group.close()
        super().finalize()

    def _serve(self, run: QueuedRun) -> None:
        try:
            params = {**run.params, "timeout_s": run.remaining_s()}
            tensors = {name.lower(): run.tensors[name] for name in TENSORS if name in run.tensors}
            with self._group.run(params, tensors) as events:
                if run.cancelled.is_set():  # before the group had a run to cancel
                    events.cancel()
                for event in events:
                    if isinstance(event, ResultEvent):
                        report = json.dumps(self._group.info).encode()
                        run.answer.send({"LATENTS": event.tensors["latents"], "REPORT": bytes_array(report)})
                    else:
                        run.answer.send(_step_outputs(event.params, event.tensors))
        except Exception as error:  # every error becomes this run's response
            run.answer.fail(error)
        run.answer.close()


def _step_outputs(params: dict[str, Any], tensors: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    outputs: dict[str, np.ndarray[Any, Any]] = {
        "STEP": np.array([params["step"]], np.int32),
        "TOTAL_STEPS": np.array([params["total_steps"]], np.int32),
        "STEP_SECONDS": np.array([params["seconds"]], np.float32),
    }
    return {**outputs, "PREVIEW": tensors["preview"]} if "preview" in tensors else outputs


def _finite(inputs: Arrays, name: str) -> float:
    value = float(inputs[name].flat[0])
    if not np.isfinite(value):
        raise InvalidRequest(f"{name} must be finite, got {value}: correct it.")
    return value
