"""Workers for the tests of the group of ranks; imported by the rank processes (PYTHONPATH), not by pytest."""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stepvideo_serve.errors import CheckpointError, DeviceLost, InvalidRequest, MemoryShortage
from stepvideo_serve.parallel.rank_process import JobContext
from stepvideo_serve.parallel.shared_memory import Array

Tensors = dict[str, Array]
Result = tuple[dict[str, Any], Tensors]


class Job(NamedTuple):
    params: dict[str, Any]
    tensors: Tensors
    context: JobContext


class PromptTooLong(InvalidRequest):
    """An error of the model's own, which the parent does not know."""


class ScriptedWorker:
    """Does what params["do"] says."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    def info(self) -> dict[str, Any]:
        threads = os.environ.get("OMP_NUM_THREADS")
        return {"settings": self._settings, "threads": threads, "torch": "torch" in sys.modules}

    def run(self, params: dict[str, Any], tensors: Tensors, context: JobContext) -> Result:
        result: Result = getattr(self, params["do"])(Job(params, tensors, context))
        return result

    def echo(self, job: Job) -> Result:
        job.context.check_cancelled()
        return {"rank": self._settings["rank"], "names": list(job.tensors)}, job.tensors

    def steps(self, job: Job) -> Result:
        for step in range(job.params["steps"]):
            job.context.check_cancelled()
            job.context.report({"step": step}, {"latent": np.full(job.params["values"], step, np.float32)})
        return {"steps": job.params["steps"]}, {}

    def until_cancelled(self, job: Job) -> Result:
        job.context.report({"step": 0}, {})
        while not job.context.cancelled():
            time.sleep(0.005)
        job.context.check_cancelled()
        return {}, {}

    def deaf(self, job: Job) -> Result:
        job.context.report({"step": 0}, {})
        threading.Event().wait()
        return {}, {}

    def deaf_steps(self, job: Job) -> Result:
        """Marks its steps, and never asks whether it is cancelled."""
        job.context.report({"step": 0}, {})
        while True:
            time.sleep(0.02)
            job.context.mark_step()

    def fail(self, job: Job) -> Result:
        if self._settings["rank"] == job.params.get("rank", 0):
            raise {"prompt": PromptTooLong, "value": ValueError}[job.params["error"]](job.params["message"])
        return self.until_cancelled(job)

    def unserialisable(self, _job: Job) -> Result:
        return {"answer": object()}, {}

    def segfault(self, _job: Job) -> Result:
        ctypes.string_at(0)
        return {}, {}

    def leave(self, _job: Job) -> Result:
        sys.exit(7)


def scripted(settings: dict[str, Any]) -> ScriptedWorker:
    return ScriptedWorker(settings)


def broken_checkpoint(_settings: dict[str, Any]) -> ScriptedWorker:
    raise CheckpointError("The checkpoint must have 48 blocks, found 47: download it again.")


def buggy(_settings: dict[str, Any]) -> ScriptedWorker:
    raise KeyError("layers")


def killed_while_loading(settings: dict[str, Any]) -> ScriptedWorker:
    if settings["rank"] == settings["world_size"] - 1:
        os.kill(os.getpid(), 9)
    return ScriptedWorker(settings)


def stopped_in_generation_2(settings: dict[str, Any]) -> ScriptedWorker:
    if settings["generation"] == 2 and settings["rank"] == settings["world_size"] - 1:
        Path(settings["log"]).write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return ScriptedWorker(settings)


def while_the_file_exists(settings: dict[str, Any]) -> ScriptedWorker:
    if not Path(settings["file"]).exists():
        raise CheckpointError("The checkpoint must be there, it is not: mount the disk.")
    return ScriptedWorker(settings)


def without_a_gpu(settings: dict[str, Any]) -> ScriptedWorker:
    """In these generations: the GPU has too little memory, or is lost while the worker is made."""
    if settings["generation"] in settings["generations"]:
        raise {"MemoryShortage": MemoryShortage, "DeviceLost": DeviceLost}[settings["error"]](
            "The GPU must do what it does not: choose another layout."
        )
    return ScriptedWorker(settings)


def never_ready(settings: dict[str, Any]) -> ScriptedWorker:
    threading.Event().wait()
    return ScriptedWorker(settings)
