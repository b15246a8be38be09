"""The first collectives of a generation, before anything is loaded: each kind that a job uses, once in each group, with
values that every rank can work out by itself.

Communicators connect at their first collective. Where GPUs cannot reach each other (an IOMMU in the way, a driver that
does not fit), that collective gives wrong values, or neither ends nor fails. Here it ends the start with a sentence;
otherwise the first request would meet it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from stepvideo_serve.errors import SetupError
from stepvideo_serve.parallel.collectives import LEADER, Collectives
from stepvideo_serve.parallel.layout import Layout

DEADLINE_S = 60.0
PARENT_NOTICES_S = 1.0
CHANNELS = 4
LARGEST_VALUE = 250  # whole numbers up to 256 are exact in bf16 and fp16, and sums of eight of them in fp32


@dataclass(frozen=True)
class Check:
    """One collective: its name in a sentence, the ranks that take part, its result and the right result."""

    what: str
    members: tuple[int, ...]
    call: Callable[[], Tensor]
    expected: Tensor


def connect(
    ranks: Collectives, layout: Layout, rank: int, device: torch.device, deadline_s: float = DEADLINE_S
) -> None:
    """Runs the checks on tensors on `device`; all ranks of the layout call this at about the same time.

    Raises SetupError, which names rank, group, expected and received, for wrong values and for a collective that has
    not ended `deadline_s` after the call. An exception of a collective is raised here a moment later: where the cause
    is another rank that has ended, the parent notices meanwhile, and ends this rank.
    """
    state = _State()
    worker = threading.Thread(target=state.run, args=(ranks, layout, rank, device), name="first contact", daemon=True)
    worker.start()
    worker.join(deadline_s)
    where, remedy = f"Rank {rank}: the {state.under_way}", _remedy(device)
    if worker.is_alive():
        raise SetupError(f"{where}, must end within {deadline_s:g} s, it has not: {remedy}.")
    if state.wrong is not None:
        raise SetupError(f"{where}, must give {state.wrong}: {remedy}.")
    if state.error is not None:
        time.sleep(PARENT_NOTICES_S)
        raise state.error
    ranks.sent_bytes.clear()
    ranks.clock.take()


class _State:
    """How far the checks are; written by the thread that runs them, which may never return from one."""

    def __init__(self) -> None:
        self.under_way = "first collective"
        self.wrong: str | None = None
        self.error: Exception | None = None

    def run(self, ranks: Collectives, layout: Layout, rank: int, device: torch.device) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # of this thread
            for check in checks(ranks, layout, rank, device):
                self.under_way = f"{check.what} of ranks {', '.join(map(str, check.members))}"
                self.wrong = difference(check.call().double().cpu(), check.expected)
                if self.wrong is not None:
                    return
        except Exception as error:
            self.error = error


def checks(ranks: Collectives, layout: Layout, rank: int, device: torch.device) -> Iterator[Check]:
    """The checks, in the same order on every rank; a check must be called before the next one is taken."""
    yield from _in_the_whole_group(ranks, layout, rank, device)
    if ranks.tp > 1:
        members = layout.group("tp", rank)
        parts = [pattern(3, CHANNELS) + member for member in members]
        own = parts[ranks.tp_index].to(device, torch.float32)
        yield Check("sum over tp", members, lambda: ranks.sum_tp(own).wait(), torch.stack(parts).sum(0))
    if ranks.sp > 1:
        yield from _among_token_slices(ranks, layout.group("sp", rank), device)
    if ranks.cfg > 1:
        both = torch.stack([pattern(3, CHANNELS), pattern(3, CHANNELS) + 1])
        mine = both[ranks.cfg_index].to(device, torch.float32)
        members = layout.group("cfg", rank)
        yield Check("exchange over cfg", members, lambda: torch.stack(ranks.exchange_branches(mine)), both)


def _in_the_whole_group(ranks: Collectives, layout: Layout, rank: int, device: torch.device) -> Iterator[Check]:
    everyone = tuple(range(layout.world_size))
    values = [[float(r), r + 0.5] for r in everyone]
    yield Check("gathering", everyone, lambda: torch.tensor(ranks.from_all(values[rank])), torch.tensor(values))
    yield Check("broadcast", everyone, lambda: torch.tensor(ranks.agree(100 + rank)), torch.tensor(100 + LEADER))
    parts = [pattern(3, CHANNELS) + r for r in everyone]
    own = parts[rank].to(device, torch.float32)

    def collect() -> Tensor:
        """On the leader all parts, elsewhere none."""
        received = ranks.collect(own, own, everyone)
        return torch.stack(received) if received else torch.empty(0)

    yield Check("sending to the leader", everyone, collect, torch.stack(parts) if rank == LEADER else torch.empty(0))


def _among_token_slices(ranks: Collectives, members: tuple[int, ...], device: torch.device) -> Iterator[Check]:
    """A head for each rank, and a token more on each than on the one before."""
    counts = [index + 1 for index in range(ranks.sp)]
    end, head = list(accumulate(counts))[ranks.sp_index], ranks.sp_index
    own = slice(end - counts[ranks.sp_index], end)
    qkv = pattern(3, ranks.sp, sum(counts), CHANNELS)
    mine = qkv[:, :, own].to(device, torch.float32)
    yield Check("exchange of heads over sp", members, lambda: ranks.to_heads(mine, counts), qkv[:, head : head + 1])
    tokens = pattern(sum(counts), ranks.sp * CHANNELS)
    slices = tokens[:, head * CHANNELS : (head + 1) * CHANNELS].to(device, torch.float32)
    yield Check("exchange of tokens over sp", members, lambda: ranks.to_tokens(slices, counts), tokens[own])
    part = tokens[own].to(device, torch.float32)
    yield Check("gathering of tokens over sp", members, lambda: ranks.gather_tokens(part, counts), tokens)


def pattern(*shape: int) -> Tensor:
    """Whole numbers as fp64, neighbours all different."""
    size = torch.Size(shape).numel()
    return (torch.arange(size, dtype=torch.float64) * 7 % LARGEST_VALUE).view(shape)


def difference(received: Tensor, expected: Tensor) -> str | None:
    """The first difference, as "36 at [0, 2], it gave 28"; None where the two tensors are equal."""
    if received.shape != expected.shape:
        return f"a shape of {list(expected.shape)}, it gave {list(received.shape)}"
    differ = (received != expected.double()).nonzero()
    if not len(differ):
        return None
    place = tuple(differ[0].tolist())
    return f"{expected[place].item():g} at {list(place)}, it gave {received[place].item():g}"


def _remedy(device: torch.device) -> str:
    if device.type != "cuda":
        return "look at the other ranks' lines in the log, and whether the loopback interface is up"
    return (
        "look at NCCL's lines in the log, at `nvidia-smi topo -m` and the driver, and switch IOMMU and ACS off where "
        "GPUs reach each other over PCIe; NCCL_P2P_DISABLE=1 does without that, slowly"
    )
