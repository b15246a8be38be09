"""How a rank process of the tests is made: the real worker, on a machine of this folder. Named as a text."""

from contextlib import ExitStack
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch

from stepvideo_serve.assembly.denoiser_rank import DenoiserRank, Outcome, TensorMap
from stepvideo_serve.parallel.collectives import Collectives
from stepvideo_serve.parallel.first_contact import connect
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.parallel.rank_process import JobContext
from stepvideo_serve.serving.rank_factory import build_rank
from tests.fakes.machine import Machine, machine


class RankOnStub:
    """The worker, whose jobs fail when one has left memory out of order."""

    def __init__(self, rank: DenoiserRank, made: Machine, held: ExitStack) -> None:
        self._rank, self._made, self._held = rank, made, held

    def info(self) -> dict[str, Any]:
        return self._rank.info()

    def run(self, params: dict[str, Any], tensors: TensorMap, context: JobContext) -> Outcome:
        outcome = self._rank.run(params, tensors, context)
        self._made.gpu.check()
        return outcome


def build(settings: dict[str, Any]) -> RankOnStub:
    """Settings of tests: "mutation" names a function that breaks the product ("module:name"), or is empty; "lost" says
    in which generation, on which rank and at which enqueue the GPU is lost, or is None."""
    held = ExitStack()
    made = held.enter_context(machine(count=settings["world_size"]))
    # Ranks meet on a thread of their own, and what stands in for torch on GPUs is of the thread that builds.
    held.enter_context(patch("stepvideo_serve.assembly.denoiser_rank.connect", _connect_on_cpu))
    rank = build_rank(settings)  # and then it breaks: the warm-up has no part in that
    lost = settings["lost"]
    if lost and (lost["generation"], lost["rank"]) == (settings["generation"], settings["rank"]):
        made.fake.lose_at_enqueue = lost["enqueue"]
    if mutation := settings["mutation"]:
        module, _, name = mutation.partition(":")
        held.enter_context(getattr(import_module(module), name)())
    return RankOnStub(rank, made, held)


def _connect_on_cpu(ranks: Collectives, layout: Layout, rank: int, _device: torch.device) -> None:
    connect(ranks, layout, rank, torch.device("cpu"))
