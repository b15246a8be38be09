"""A worker whose ranks meet in one collective, one of them late; imported by the rank processes."""

import time
from typing import Any

import torch

from stepvideo_serve.parallel.collectives import Collectives, init_process_group
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.parallel.rank_process import JobContext
from stepvideo_serve.parallel.shared_memory import Array

Tensors = dict[str, Array]


class WaitingWorker:
    """One collective of the layout's axis a job; the result says how long each rank waited in it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        init_process_group(settings, "gloo", timeout_s=120.0)
        self._rank = settings["rank"]
        self._layout = Layout.parse(settings["layout"])
        self._collectives = Collectives(self._layout, self._rank)

    def info(self) -> dict[str, Any]:
        return {}

    def run(self, params: dict[str, Any], tensors: Tensors, context: JobContext) -> tuple[dict[str, Any], Tensors]:  # noqa: ARG002
        collectives = self._collectives
        collectives.agree(0)  # from here on together
        time.sleep(params["late_s"] * (self._rank == params["late"]))
        if self._layout.cfg > 1:
            collectives.exchange_branches(torch.ones(4))
        elif self._layout.tp > 1:
            collectives.sum_tp(torch.ones(4)).wait()
        else:
            collectives.to_heads(torch.ones(3, 2, 2, 4), [2, 2])
        ranks = collectives.from_all([float(self._rank), collectives.clock.take(), collectives.clock.take()])
        return {"ranks": ranks}, {}


def waiting(settings: dict[str, Any]) -> WaitingWorker:
    return WaitingWorker(settings)
