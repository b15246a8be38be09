"""Workers that meet over gloo, some of them with collectives that are wrong; imported by the rank processes."""

import os
import threading
from typing import Any

import torch
from torch import Tensor

from stepvideo_serve.errors import SetupError
from stepvideo_serve.parallel.collectives import Collectives, Exchange, init_process_group
from stepvideo_serve.parallel.communicator import Done
from stepvideo_serve.parallel.first_contact import connect
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.parallel.rank_process import JobContext
from stepvideo_serve.parallel.shared_memory import Array

CPU = torch.device("cpu")


class Corrupt:
    """The collectives, but one of them gives the first value that it returns one more than it should."""

    def __init__(self, ranks: Collectives, name: str) -> None:
        self._ranks, self._name = ranks, name

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ranks, name)
        return (lambda *given: spoiled(found(*given))) if name == self._name else found


def spoiled(result: Any) -> Any:
    if isinstance(result, Tensor):
        wrong = result.clone()
        wrong.view(-1)[0] += 1
        return wrong
    if isinstance(result, Exchange | Done):
        return Done(spoiled(result.wait()))
    if isinstance(result, tuple | list):
        return type(result)([spoiled(result[0]), *result[1:]]) if result else [torch.ones(1)]
    return result + 1


class NeverSums(Collectives):
    """Rank 1 never comes to the sum, and the others wait for it."""

    def sum_tp(self, partial: Tensor) -> Done | Exchange:
        if self.tp_index == 1:
            threading.Event().wait()
        return super().sum_tp(partial)


class Idle:
    """Has met the others, and says how."""

    def __init__(self, said: dict[str, Any]) -> None:
        self._said = said

    def info(self) -> dict[str, Any]:
        names = ("NCCL_", "GLOO_", "PYTORCH_")
        return {**self._said, "environment": {name: os.environ[name] for name in os.environ if name.startswith(names)}}

    def run(
        self, params: dict[str, Any], tensors: dict[str, Array], context: JobContext
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        del params, tensors, context
        return {}, {}


def meet(settings: dict[str, Any]) -> Layout:
    torch.set_num_threads(1)
    init_process_group(settings, "gloo", timeout_s=300.0)
    return Layout.parse(settings["layout"])


def corrupt(settings: dict[str, Any]) -> Idle:
    """Once with all collectives as they are, and once with each of settings["names"] corrupt on every rank."""
    layout, rank = meet(settings), settings["rank"]
    ranks = Collectives(layout, rank)
    connect(ranks, layout, rank, CPU)
    said: dict[str, Any] = {"sentences": {}, "counted": [sum(ranks.sent_bytes.values()), ranks.clock.take()]}
    for name in settings["names"]:
        try:
            connect(Corrupt(ranks, name), layout, rank, CPU)  # type: ignore[arg-type]
        except SetupError as error:
            said["sentences"][name] = str(error)
    return Idle(said)


def wrong_on_one_rank(settings: dict[str, Any]) -> Idle:
    layout, rank = meet(settings), settings["rank"]
    ranks = Collectives(layout, rank)
    connect(Corrupt(ranks, "sum_tp") if rank == 1 else ranks, layout, rank, CPU)  # type: ignore[arg-type]
    return Idle({})


def never_sums(settings: dict[str, Any]) -> Idle:
    layout, rank = meet(settings), settings["rank"]
    connect(NeverSums(layout, rank), layout, rank, CPU, deadline_s=settings["deadline_s"])
    return Idle({})
