"""A worker that exchanges tokens for heads and back, and says whether every value came where it belongs; imported by
the rank processes."""

from typing import Any

import torch

from stepvideo_serve.parallel.collectives import Collectives, init_process_group
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.parallel.rank_process import JobContext
from stepvideo_serve.parallel.shared_memory import Array

Tensors = dict[str, Array]
HEAD_DIM = 4


class ExchangingWorker:
    """Every rank makes the whole tensor, gives its tokens away, and compares what comes with its heads."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        init_process_group(settings, "gloo", timeout_s=120.0)
        self._rank, self._ranks = settings["rank"], settings["world_size"]
        self._collectives = Collectives(Layout(sp=self._ranks), self._rank)

    def info(self) -> dict[str, Any]:
        return {}

    def run(self, params: dict[str, Any], tensors: Tensors, context: JobContext) -> tuple[dict[str, Any], Tensors]:  # noqa: ARG002
        counts, heads = params["counts"], params["heads"]
        whole = torch.randn(3, heads, sum(counts), HEAD_DIM, generator=torch.Generator().manual_seed(1))
        own_tokens = whole.split(counts, dim=2)[self._rank].contiguous()
        own_heads = whole.chunk(self._ranks, dim=1)[self._rank]
        exchanged = self._collectives.to_heads(own_tokens, counts)
        out = whole[0].transpose(0, 1).flatten(1)  # [N, H * D]
        back = self._collectives.to_tokens(out.chunk(self._ranks, dim=1)[self._rank].contiguous(), counts)
        gathered = self._collectives.gather_tokens(out.split(counts)[self._rank], counts)
        right = [torch.equal(exchanged, own_heads), torch.equal(back, out.split(counts)[self._rank])]
        right += [torch.equal(gathered, out), exchanged.is_contiguous(), back.is_contiguous()]
        return {"right": self._collectives.from_all([float(one) for one in right])}, {}


def exchanging(settings: dict[str, Any]) -> ExchangingWorker:
    return ExchangingWorker(settings)
