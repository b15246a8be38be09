"""What may be quantised, and what it is called.

Names are those of the checkpoint without ".weight" ("transformer_blocks.3.attn1.wqkv",
"transformer.layers.0.feed_forward.w2"), whatever graph or slice a layer sits in. Quantised are the linear layers of the
DiT's blocks and of Step-LLM's layers, and the core of the DiT's self-attention. Everything else stays as it is: norms,
adaLN, embeddings, first and last projections, and the core of cross-attention, which is 0.5 % of a step's operations.
"""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from stepvideo_serve.dit.blocks import AttentionCore
from stepvideo_serve.dit.config import BLOCKS_PREFIX, DiTConfig
from stepvideo_serve.dit.segments import CoreSegment
from stepvideo_serve.errors import ExportError
from stepvideo_serve.text.step_llm import LAYERS_PREFIX, StepLLMConfig

SHARED_CORE = f"{BLOCKS_PREFIX}*.attn1.core"
"""The graph of attention alone, in layouts that split the tokens, serves all blocks: its name stands for all theirs."""

OPERANDS = ("q", "k", "v")
DIT_LINEARS = ("attn1.wqkv", "attn1.wo", "attn2.wq", "attn2.wkv", "attn2.wo", "ff.net.0.proj", "ff.net.2")
LLM_LINEARS = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2")

_HALF = re.compile(r"step_llm_(?:attn|ff|layer)_(\d+)")
_PIECE = re.compile(r"dit_([a-z]+)_")

# Which layers of its block a graph of the DiT uses; it may hold them all.
_USED = {
    "block": ("attn1.*", "attn2.wq", "attn2.wo", "ff.*"),
    "cross": ("attn2.wkv",),
    "attn": ("attn1.*",),
    "qkv": ("attn1.wqkv",),
    "out": ("attn1.wo",),
    "text": ("attn2.wq", "attn2.wo"),
    "ff": ("ff.*",),
    "core": ("attn1.core",),
}


class NamedGraph(Protocol):
    """What a graph is called, and which keys of the checkpoint its module is made from (assembly.graphs.Component)."""

    @property
    def name(self) -> str: ...
    @property
    def part(self) -> str: ...
    @property
    def prefix(self) -> str: ...


@dataclass(frozen=True)
class Layer:
    """A module that may be quantised: its name, and where it hangs."""

    name: str
    module: nn.Module
    parent: nn.Module
    attribute: str

    def put(self, replacement: nn.Module) -> None:
        """Hangs another module in its place."""
        setattr(self.parent, self.attribute, replacement)


def quantizable(graph: NamedGraph, module: nn.Module) -> Iterator[Layer]:
    """The linear layers and attention cores of a graph's module that may be quantised, in the order of its tree."""
    for path in [path for path, _ in module.named_modules()]:  # paths only: a replaced layer must not stay in memory
        name = _name(graph, module, path)
        if name is not None and isinstance(module.get_submodule(path), nn.Linear | AttentionCore):
            parent_path, _, attribute = path.rpartition(".")
            yield Layer(name, module.get_submodule(path), module.get_submodule(parent_path), attribute)


def all_names(dit: DiTConfig, llm: StepLLMConfig) -> list[str]:
    """The names of every layer of a model that is quantised unless told otherwise."""
    blocks, layers = range(dit.num_layers), range(llm.num_layers)
    return [
        *(f"{BLOCKS_PREFIX}{i}.{name}" for i in blocks for name in (*DIT_LINEARS, "attn1.core")),
        *(f"{LAYERS_PREFIX}{i}.{name}" for i in layers for name in LLM_LINEARS),
    ]


def check_globs(globs: Sequence[str], dit: DiTConfig, llm: StepLLMConfig) -> None:
    """Raises ExportError for one that matches no layer: misspelt, it would quantise what it was to keep."""
    names = all_names(dit, llm)
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise ExportError(
                f"--keep-bf16 must match layers such as {names[0]} or {names[-1]}, {glob!r} matches none of "
                f"{len(names)}: correct it."
            )


def is_kept(name: str, globs: Sequence[str]) -> bool:
    """Whether one of the globs matches; the shared core is kept by a glob for the cores of all blocks."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def layer_of(tensor: str) -> str:
    """ "transformer_blocks.0.attn1.core.q" -> "transformer_blocks.0.attn1.core"; the input of a linear layer has its
    name."""
    layer, _, operand = tensor.rpartition(".")
    return layer if layer.endswith(".core") and operand in OPERANDS else tensor


def belongs(graph: NamedGraph, name: str) -> bool:
    """Whether a graph uses the layer of this name; every block's core belongs to the graph of attention alone."""
    if graph.part == "dit":
        piece = _PIECE.match(graph.name)
        if piece is None or piece[1] not in _USED or not name.startswith(graph.prefix):
            return False
        if piece[1] == "core":
            return fnmatch.fnmatchcase(name, SHARED_CORE)
        local = name.removeprefix(graph.prefix)
        return any(fnmatch.fnmatchcase(local, glob) for glob in _USED[piece[1]])
    half = _HALF.fullmatch(graph.name)
    return graph.part == "llm" and name.startswith(f"{LAYERS_PREFIX}{int(half[1])}." if half else LAYERS_PREFIX)


def _name(graph: NamedGraph, module: nn.Module, path: str) -> str | None:
    """The checkpoint's name of what is at `path` of a graph's module; None when the graph does not use it."""
    local = path.removeprefix("block.")
    half = _HALF.fullmatch(graph.name)
    if isinstance(module, CoreSegment):
        name = SHARED_CORE if local == "core" else local
    elif graph.part == "dit":
        name = graph.prefix + local
    else:
        name = f"{LAYERS_PREFIX}{int(half[1])}.{local}" if half else local
    return name if belongs(graph, name) else None
