"""The model `dit_denoiser`: takes denoising runs, queues them, and drives the group of ranks that computes them.

A request with RUN_ID is a run: a response per step, then LATENTS. A request with CANCEL_RUN ends the run of that id,
waiting or under way (servers before 25.04 cannot cancel one model's call of another).
"""

import json
import os
from contextlib import closing
from typing import Any

import numpy as np

from stepvideo_serve.config import ENVIRONMENT_VARIABLE, ServeConfig
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.run import ResultEvent
from stepvideo_serve.serving.adapter import Arrays, Sender, bytes_array, clear_setup_errors, end_process, read_inputs
from stepvideo_serve.serving.resume import ResumableDenoise, run_on
from stepvideo_serve.serving.run_queue import QueuedRun, RunQueue

RANK_FACTORY = "stepvideo_serve.serving.rank:build_rank"
TENSORS = ("LATENTS", "CONDITION", "POSITIVE_LLM", "POSITIVE_CLIP", "NEGATIVE_LLM", "NEGATIVE_CLIP")
REQUIRED_SCALARS = ("STEPS", "CFG_SCALE", "TIME_SHIFT", "MOTION_SCORE")


class DenoiserModel:
    """Owns the queue and the ranks. The ranks are child processes: what kills one never kills this model."""

    def initialize(self, args: dict[str, str]) -> None:  # noqa: ARG002  # the signature is Triton's
        with clear_setup_errors():
            config = ServeConfig.from_environment()
            self._max_steps = config.limits.max_steps
            self._max_resumes = config.denoiser.max_resumes
            self._group = RankGroup(
                RANK_FACTORY,
                {"config": os.environ[ENVIRONMENT_VARIABLE]},
                start_timeout_s=config.denoiser.start_timeout_s,
                heartbeat_s=config.denoiser.heartbeat_s,
                first_step_timeout_s=config.denoiser.first_step_timeout_s,
                arena_bytes=config.denoiser.arena_mib << 20,
                threads_per_rank=config.denoiser.threads or os.cpu_count(),
            )
            self._group.start()
        self._queue = RunQueue(config.denoiser.max_queued, self._serve, self._group.cancel)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = Sender(request)
            try:
                inputs = read_inputs(request)
                if "CANCEL_RUN" in inputs:
                    self._queue.cancel(inputs["CANCEL_RUN"].flat[0].decode())
                    sender.close()
                else:
                    self._queue.put(self._queued(inputs, sender))
            except Exception as error:  # every error becomes this request's response
                sender.fail(error)

    def is_ready(self) -> bool:
        """Asked by servers from 26.03 on: not while ranks that were lost are started anew."""
        return self._group.healthy

    def finalize(self) -> None:
        self._queue.close()
        self._group.close()
        end_process()

    def _queued(self, inputs: Arrays, sender: Sender) -> QueuedRun:
        missing = [name for name in ("RUN_ID", *REQUIRED_SCALARS) if name not in inputs]
        if missing:
            raise InvalidRequest(f"A run needs {missing[0]}, got none: call the model ti2v instead.")
        steps = int(inputs["STEPS"].flat[0])
        if not 1 <= steps <= self._max_steps:
            raise InvalidRequest(f"STEPS must be 1 to {self._max_steps}, got {steps}: ask for fewer.")
        params = {
            "steps": steps,
            "cfg_scale": _finite(inputs, "CFG_SCALE"),
            "time_shift": _finite(inputs, "TIME_SHIFT"),
            "motion_score": _finite(inputs, "MOTION_SCORE"),
            "preview_every": int(inputs["PREVIEW_EVERY"].flat[0]) if "PREVIEW_EVERY" in inputs else 0,
            "timeout_s": _finite(inputs, "TIMEOUT_S") if "TIMEOUT_S" in inputs else None,
        }
        tensors = {name.lower(): inputs[name] for name in TENSORS if name in inputs}
        return QueuedRun(inputs["RUN_ID"].flat[0].decode(), params, tensors, sender)

    def _serve(self, run: QueuedRun) -> None:
        try:
            job = ResumableDenoise(run.params, run.tensors)
            with closing(run_on(self._group, run, job, self._max_resumes)) as events:
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
