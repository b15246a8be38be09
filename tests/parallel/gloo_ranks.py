"""A worker whose ranks sum over gloo in each step, and can be made to fail; imported by the rank processes."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stepvideo_serve.engine.device_errors import device_errors
from stepvideo_serve.errors import DeadlineExceeded, RequestCancelled
from stepvideo_serve.parallel.collectives import init_process_group
from stepvideo_serve.parallel.rank_process import JobContext
from stepvideo_serve.parallel.shared_memory import Array
from tests.parallel.failing import fail, fail_at_signals, use_device

Tensors = dict[str, Array]


class GlooWorker:
    """latents + sum over ranks of sin(latents * (rank + 1) + step) / 8, step by step, in fp32."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._rank, self._generation = settings["rank"], settings["generation"]
        torch.set_num_threads(1)
        fail_at_signals()
        self._fail_if_due(settings.get("fault"), "start")
        init_process_group(settings, "gloo", timeout_s=120.0)

    def info(self) -> dict[str, Any]:
        return {"generation": self._generation}

    def run(self, params: dict[str, Any], tensors: Tensors, context: JobContext) -> tuple[dict[str, Any], Tensors]:
        with device_errors():
            return self._run(params, tensors, context)

    def _run(self, params: dict[str, Any], tensors: Tensors, context: JobContext) -> tuple[dict[str, Any], Tensors]:
        began_s = time.monotonic()
        latents = torch.from_numpy(tensors["latents"])
        for step in range(params["start_step"], params["steps"]):
            self._fail_if_due(params.get("fault"), step)
            use_device()
            velocity = torch.sin(latents * (self._rank + 1) + step)
            time.sleep(params.get("step_s", 0.0))
            dist.all_reduce(velocity)
            latents = latents + velocity / 8
            context.mark_step()
            report = {"step": step + 1, "total_steps": params["steps"], "seconds": 0.0}
            context.report(report, {"latents": latents.numpy()})
            too_late = params["timeout_s"] is not None and time.monotonic() > began_s + params["timeout_s"]
            verdict = torch.tensor([context.cancelled(), too_late])
            dist.broadcast(verdict, 0)
            if verdict[0]:
                raise RequestCancelled("The request was cancelled.")
            if verdict[1]:
                raise DeadlineExceeded("The time is over.")
        return {}, {"latents": latents.numpy()}

    def _fail_if_due(self, fault: dict[str, Any] | None, moment: int | str) -> None:
        if fault and (self._rank, self._generation, moment) in map(tuple, fault["when"]):
            Path(fault["log"]).write_text(str(time.monotonic()))
            fail(fault["how"])


def gloo(settings: dict[str, Any]) -> GlooWorker:
    return GlooWorker(settings)
