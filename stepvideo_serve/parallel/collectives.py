"""The communicator over torch.distributed: NCCL between GPUs, gloo between CPUs, the same code.

Groups of one rank cost nothing: no collective is called for an axis of size 1. Payload bytes handed to the collectives
are counted by kind, for comparison with the planner's prediction.

The ranks of one generation find each other by torch.distributed's file store in memory without a name. The parent makes
the memory anew for every generation and hands it down (generation.py), so no key of a former generation is ever seen,
no port is needed, and nothing is left behind: the memory is gone with the last process that has it open.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stepvideo_serve.errors import DeviceLost
from stepvideo_serve.parallel.communicator import Done
from stepvideo_serve.parallel.layout import SIZES, Layout

LEADER = 0


class WaitClock:
    """Seconds in which this rank's computation waited for tensors of other ranks: by the host's clock on CPUs, on GPUs
    by events on the current stream, where nothing waits until the events are read."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def waiting(self, payload: Tensor) -> Iterator[None]:
        """Measures a block that waits, or that has the stream of `payload` wait."""
        if not payload.is_cuda:
            began_s = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began_s
            return
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        yield
        ended.record()
        self._pairs.append((began, ended))

    def settle(self) -> None:
        """Reads the events that the GPU has passed, without waiting, so that events do not pile up."""
        while self._pairs and self._pairs[0][1].query():
            self._read_first()

    def take(self) -> float:
        """Seconds since the last call; waits until the GPU has passed the events so far."""
        while self._pairs:
            self._pairs[0][1].synchronize()
            self._read_first()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _read_first(self) -> None:
        began, ended = self._pairs.popleft()
        self._seconds += began.elapsed_time(ended) / 1000.0


@contextmanager
def communicator_errors() -> Iterator[None]:
    """For every exchange of tensors: an error of NCCL becomes DeviceLost, since its communicators are of no use after
    one."""
    try:
        yield
    except dist.DistBackendError as error:
        said = str(error).partition("\n")[0].rstrip(".")
        raise DeviceLost(f"The ranks must exchange tensors, NCCL cannot: {said}: send the request again.") from error


@dataclass(frozen=True)
class Exchange:
    """A collective under way. The tensor that is sent must not change before `wait` has returned."""

    work: dist.Work
    result: Tensor
    clock: WaitClock
    sent: Tensor

    def wait(self) -> Tensor:
        """The result. Raises RuntimeError when a rank of the group is gone, or its part does not come in time."""
        with self.clock.waiting(self.result):
            self.work.wait()
        return self.result


class Collectives:
    """One rank's communicator for a layout. The default process group must be initialised with layout.world_size."""

    def __init__(self, layout: Layout, rank: int) -> None:
        own = layout.coordinates(rank)
        self.cfg, self.tp, self.sp = layout.cfg, layout.tp, layout.sp
        self.cfg_index, self.tp_index, self.sp_index = own.cfg, own.tp, own.sp
        self.sent_bytes: Counter[str] = Counter()
        self.clock = WaitClock()
        self._groups = {axis: _make_groups(layout, axis, rank) for axis in SIZES if getattr(layout, axis) > 1}

    def sum_tp(self, partial: Tensor) -> Done | Exchange:
        """See Communicator."""
        if self.tp == 1:
            return Done(partial)
        partial = partial.contiguous()
        self._count("sum_tp", partial)
        work = dist.all_reduce(partial, group=self._groups["tp"], async_op=True)
        if work is None:
            raise RuntimeError("this rank is not part of its tensor-parallel group")
        return Exchange(work, partial, self.clock, partial)

    def to_heads(self, qkv: Tensor, counts: list[int]) -> Tensor:
        """See Communicator. Each rank is sent its heads of this rank's tokens: q, k and v one after the other, since
        the heads of one rank lie together in each of them."""
        heads, own, head_dim = qkv.shape[1] // self.sp, qkv.shape[2], qkv.shape[3]
        exchanged = qkv.new_empty(3, heads, sum(counts), head_dim)
        sent, received = [heads * own * head_dim] * self.sp, [heads * n * head_dim for n in counts]
        under_way = [self._all_to_all("to_heads", part.flatten(), sent, received) for part in qkv]
        for whole, exchange in zip(exchanged, under_way, strict=True):
            parts = exchange.wait().split(received)
            torch.cat([part.view(heads, -1, head_dim) for part in parts], dim=1, out=whole)
        return exchanged

    def to_tokens(self, out: Tensor, counts: list[int]) -> Tensor:
        """See Communicator. Each rank is sent its tokens of this rank's heads."""
        own, channels = counts[self.sp_index], out.shape[1]
        sent, received = [n * channels for n in counts], [own * channels] * self.sp
        exchange = self._all_to_all("to_tokens", out.flatten(), sent, received)
        return torch.cat(list(exchange.wait().view(self.sp, own, channels)), dim=1)

    def gather_tokens(self, own: Tensor, counts: list[int]) -> Tensor:
        """See Communicator. An all-to-all in which every rank gets the same: an all-gather needs equal counts."""
        sent, received = [own.numel()] * self.sp, [n * own.shape[1] for n in counts]
        exchange = self._all_to_all("gather_tokens", own.flatten().repeat(self.sp), sent, received)
        return exchange.wait().view(-1, own.shape[1])

    def exchange_branches(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """See Communicator."""
        own = own.contiguous()
        self._count("exchange_branches", own)
        both = own.new_empty((2, *own.shape))
        with self.clock.waiting(own):
            dist.all_gather_single(both.flatten(0, 1), own, group=self._groups["cfg"])
        return both[0], both[1]

    def agree(self, value: int) -> int:
        """The leader's value, on every rank, so that all ranks decide alike between two steps."""
        decision = torch.tensor([value])
        dist.broadcast(decision, src=LEADER)
        self.clock.settle()
        return int(decision)

    def from_all(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, by rank, on every rank; each rank gives equally many."""
        own = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        return [row.tolist() for row in gathered]

    def collect(self, own: Tensor | None, like: Tensor, owners: Sequence[int]) -> list[Tensor]:
        """On the leader, one tensor of the shape and dtype of `like` from each owner, in that order; on other ranks an
        empty list. `own` is what this rank gives, or None."""
        rank = dist.get_rank()
        if rank != LEADER:
            if own is not None:
                dist.send(own.contiguous(), dst=LEADER)
            return []
        received = []
        for owner in owners:
            if owner == LEADER and own is not None:
                received.append(own)
            else:
                received.append(torch.empty_like(like))
                dist.recv(received[-1], src=owner)
        return received

    def _all_to_all(self, kind: str, outgoing: Tensor, sent: list[int], received: list[int]) -> Exchange:
        """Starts an all-to-all. The tensor has one dimension: `sent` elements of it go to each rank, in the order of
        the ranks; `received` elements come from each."""
        incoming = outgoing.new_empty(sum(received))
        self._count(kind, outgoing)
        group = self._groups["sp"]
        work = dist.all_to_all_single(incoming, outgoing, received, sent, group=group, async_op=True)
        if work is None:
            raise RuntimeError("this rank is not part of its sequence-parallel group")
        return Exchange(work, incoming, self.clock, outgoing)

    def _count(self, kind: str, payload: Tensor) -> None:
        self.sent_bytes[kind] += payload.nbytes


def _make_groups(layout: Layout, axis: str, rank: int) -> dist.ProcessGroup:
    """The group of `rank` among these. Every rank must create every group, in the same order."""
    mine = None
    for ranks in sorted({layout.group(axis, r) for r in range(layout.world_size)}):
        group = dist.new_group(list(ranks))
        if rank in ranks:
            mine = group
    if not isinstance(mine, dist.ProcessGroup):
        raise RuntimeError(f"rank {rank} is in no group along {axis}")
    return mine


def init_process_group(settings: Mapping[str, Any], backend: str, timeout_s: float) -> None:
    """Join the default process group of the generation; to be called by every rank, once.

    `settings` are what the rank's factory is given (rank, world_size, rendezvous). `timeout_s` limits the meeting and
    every gloo collective; it should be longer than any step, since the parent is the one that looks for stuck ranks.
    All ranks are on this machine: gloo talks over the loopback interface.

    Raises torch.distributed.DistError when the others do not come.
    """
    import torch.distributed as dist  # imported here, because the parent has no torch

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        backend,
        init_method=f"file://{settings['rendezvous']}",
        rank=settings["rank"],
        world_size=settings["world_size"],
        timeout=timedelta(seconds=timeout_s),
    )
