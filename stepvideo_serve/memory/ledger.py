"""Bytes that each process of a server holds on its GPU, by what they are for: one ledger for the planner, for the
loader where it looks for room, and for the doctor. Pure arithmetic.

What graphs hold (Graphs) comes from the manifest of engines (assembly/engines.py), or is predicted (predicted.py).
Keys and values of the texts and the tokens between graphs follow from the layout and the largest request. Contexts,
communicators and the rest are estimates: nobody has asked a GPU. Letters: D width, n tokens of a rank.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from stepvideo_serve.memory.placement import SECTIONS, SERVER, Placement
from stepvideo_serve.memory.sizes import BF16_BYTES, FP32_BYTES, GIB, Widths, own_branches
from stepvideo_serve.parallel.layout import SIZES, Layout, split_evenly

CONTEXT_BYTES = GIB // 2
"""CUDA's context of one process."""
COMMUNICATOR_BYTES = GIB // 2
"""Buffers of one of NCCL's communicators; a rank has one with all ranks, and one along each axis of its layout."""
RANK_REST_BYTES, STAGE_REST_BYTES = GIB, GIB // 4
"""Machine code of a process's graphs (some 290 on a rank), the libraries' workspaces, what the allocator cannot use."""
POOL_BYTES = 64 * 2**20
"""What Triton itself takes on each GPU (its default)."""


@dataclass(frozen=True)
class Graphs:
    """Of one process, in bytes. activations: of the graph that needs most of them, since one runs after the other."""

    weights: int = 0
    activations: int = 0

    def __add__(self, other: "Graphs") -> "Graphs":
        """Of one process that holds both."""
        return Graphs(self.weights + other.weights, max(self.activations, other.activations))


@dataclass(frozen=True)
class Between:
    """What a rank keeps beside its graphs while it denoises, in bytes: the texts' keys and values of all blocks, and
    the video's tokens on their way from graph to graph."""

    keys_values: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Holding:
    """One process on one GPU, in bytes."""

    process: str
    gpu: int
    weights: int = 0
    activations: int = 0
    keys_values: int = 0
    tokens: int = 0
    communicators: int = 0
    context: int = CONTEXT_BYTES
    rest: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Purpose -> bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("process", "gpu")}

    @property
    def tensors(self) -> int:
        """Without what only a GPU asks for: what the process holds where there is none."""
        return self.weights + self.activations + self.keys_values + self.tokens

    @property
    def after_graphs(self) -> int:
        """What comes when context, communicators and graphs are there: the loader leaves it free."""
        return self.keys_values + self.tokens + self.rest


@dataclass(frozen=True)
class Ledger:
    """All processes of one server."""

    holdings: tuple[Holding, ...]

    def of(self, process: str) -> Holding:
        """Raises KeyError for a process that uses no GPU."""
        for holding in self.holdings:
            if holding.process == process:
                return holding
        raise KeyError(process)

    def on(self, gpu: int) -> list[Holding]:
        return [holding for holding in self.holdings if holding.gpu == gpu]

    @property
    def by_gpu(self) -> dict[int, int]:
        """GPU -> bytes, in the order of the GPUs."""
        gpus = sorted({holding.gpu for holding in self.holdings})
        return {gpu: sum(holding.total for holding in self.on(gpu)) for gpu in gpus}

    @property
    def fullest(self) -> int:
        """The GPU with the most on it."""
        return max(self.by_gpu, key=self.by_gpu.__getitem__)

    def without(self, gpus: Iterable[int]) -> "Ledger":
        """As if these GPUs were another machine's."""
        gone = set(gpus)
        return Ledger(tuple(holding for holding in self.holdings if holding.gpu not in gone))


def ledger(placement: Placement, graphs: Mapping[str, Graphs], between: Between) -> Ledger:
    """graphs: by process; a process that is not there holds none. between: of each rank."""
    found = []
    for process, gpu in placement.processes.items():
        held = graphs.get(process, Graphs())
        if process in SECTIONS:
            holding = Holding(process, gpu, held.weights, held.activations, rest=STAGE_REST_BYTES)
        else:
            holding = Holding(
                process,
                gpu,
                held.weights,
                held.activations,
                between.keys_values,
                between.tokens,
                communicators=communicators(placement.layout) * COMMUNICATOR_BYTES,
                rest=RANK_REST_BYTES,
            )
        found.append(holding)
    return Ledger((*found, *(Holding(SERVER, gpu, rest=POOL_BYTES) for gpu in placement.gpus)))


def communicators(layout: Layout) -> int:
    """Of one rank."""
    return 0 if layout.world_size == 1 else 1 + sum(getattr(layout, axis) > 1 for axis in SIZES)


def between_graphs(
    widths: Widths, layout: Layout, tokens: int, text_tokens: int, branches: int = 2, value_bytes: int = BF16_BYTES
) -> Between:
    """Of the rank with the most tokens, for a request of so many."""
    own, mine = split_evenly(tokens, layout.sp)[0], own_branches(layout, branches)
    rope = 2 * own * widths.head_dim * FP32_BYTES
    return Between(
        keys_values=2 * widths.layers * mine * text_tokens * widths.width // layout.tp * value_bytes,
        tokens=living_tokens(layout, mine) * own * widths.width * value_bytes + rope,
    )


def living_tokens(layout: Layout, branches: int) -> int:
    """How many [n, D] live between the pieces: a step's first tokens, the running branch's tokens before and after,
    its sum and its new partial result, and per waiting branch tokens and sum. Whole blocks have no sums."""
    return 3 if layout.tp == layout.sp == 1 else 5 + 2 * (branches - 1)
