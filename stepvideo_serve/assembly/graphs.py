"""Every graph of the system: its name, its spec, and how its module is loaded from a checkpoint.

The one table behind the export, the eager runners and the verification.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import nn

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.dit.blocks import DiTBlock
from stepvideo_serve.dit.config import BLOCKS_PREFIX, DiTConfig
from stepvideo_serve.dit.graphs import (
    ContextGraph,
    CrossGraph,
    EmbedGraph,
    FinalGraph,
    block_spec,
    context_spec,
    cross_spec,
    embed_spec,
    final_spec,
)
from stepvideo_serve.dit.segments import PIECES, CoreSegment, core_name, core_spec, segment_module, segment_spec
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.text.segments import llm_embed_spec, llm_half_spec, llm_layer_spec
from stepvideo_serve.vae.graphs import vae_decoder_spec, vae_encoder_spec
from stepvideo_serve.weights.cuts import TensorPart

TEXT_GRAPHS = ("step_llm", "hunyuan_clip")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Component:
    """One graph. `part` and `prefix` say which keys of the checkpoint it is made from (`Checkpoint.digest`)."""

    spec: EngineSpec
    part: str
    prefix: str
    load: Callable[[], nn.Module]

    @property
    def name(self) -> str:
        return self.spec.name


def components(checkpoint: Checkpoint, precision: str) -> dict[str, Component]:
    """All graphs of `checkpoint` in the order of the data flow; modules load when asked for, weights in `precision`
    ("fp32", "bf16" or "fp16"). Raises CheckpointError."""
    name = DTYPES[precision]
    dtype = getattr(torch, name)
    parts = [*_text(checkpoint, name, dtype), *_vae(checkpoint, name, dtype), *_dit(checkpoint, name, dtype)]
    return {part.name: part for part in parts}


def part_components(checkpoint: Checkpoint, precision: str, part: TensorPart, sequence: bool) -> dict[str, Component]:
    """The graphs that hold one rank's slice of the DiT: block pieces, and keys and values of its heads. `sequence`: cut
    around the attention core too, for layouts that split the tokens. The other graphs are those of `components`."""
    name = DTYPES[precision]
    dtype = getattr(torch, name)
    config = checkpoint.dit_config
    block = lru_cache(maxsize=1)(partial(checkpoint.dit_block, dtype=dtype, part=part))  # its pieces share its weights
    table = []
    for index in range(config.num_layers):
        prefix = f"{BLOCKS_PREFIX}{index}."
        for piece in PIECES[sequence]:
            spec = segment_spec(config, name, piece, index, part.count)
            table.append(Component(spec, "dit", prefix, partial(_load_piece, block, index, piece)))
        spec = cross_spec(config, name, index, part.count)
        table.append(Component(spec, "dit", prefix, partial(_load_piece, block, index, "cross")))
    return {component.name: component for component in table}


def llm_part_components(checkpoint: Checkpoint, precision: str, part: TensorPart) -> dict[str, Component]:
    """The graphs of one rank's slice of Step-LLM: its embeddings, and two halves of every layer."""
    name = DTYPES[precision]
    dtype = getattr(torch, name)
    config = checkpoint.llm_config
    embed = llm_embed_spec(config, name)
    table = [Component(embed, "llm", "", partial(checkpoint.llm_embed, dtype))]
    loaders: dict[str, Callable[..., nn.Module]] = {
        "attn": checkpoint.llm_attention,
        "ff": checkpoint.llm_feed_forward,
    }
    for index in range(config.num_layers):
        for half, load in loaders.items():
            spec = llm_half_spec(config, name, half, index)
            table.append(Component(spec, "llm", "", partial(load, index, dtype, part)))
    return {component.name: component for component in table}


def llm_layer_components(checkpoint: Checkpoint, precision: str) -> dict[str, Component]:
    """Step-LLM whole, as its embeddings and a graph for each layer."""
    name = DTYPES[precision]
    dtype = getattr(torch, name)
    config = checkpoint.llm_config
    table = [Component(llm_embed_spec(config, name), "llm", "", partial(checkpoint.llm_embed, dtype))]
    for index in range(config.num_layers):
        load = partial(checkpoint.llm_layer, index, dtype)
        table.append(Component(llm_layer_spec(config, name, index), "llm", "", load))
    return {component.name: component for component in table}


def core_component(precision: str, heads: int) -> Component:
    """Attention of `heads` heads over all tokens: no weights, the same graph for every block and rank."""
    return Component(core_spec(DTYPES[precision], heads), "dit", BLOCKS_PREFIX, CoreSegment)


def sharded_graph_names(config: DiTConfig, tp: int, sp: int) -> tuple[list[str], list[str]]:
    """What a rank of a layout runs: names of graphs that all ranks share, and of its own part's (none with whole
    blocks)."""
    if tp == sp == 1:
        return dit_graph_names(config.num_layers), []
    core = [core_name(config.num_heads // (tp * sp))] if sp > 1 else []
    pieces = [*PIECES[sp > 1], "cross"]
    own = [f"dit_{piece}_{i:02d}" for i in range(config.num_layers) for piece in pieces]
    return ["dit_context", "dit_embed", "dit_final", *core], own


def _load_piece(load_block: Callable[[int], DiTBlock], index: int, piece: str) -> nn.Module:
    block = load_block(index)
    return CrossGraph(block) if piece == "cross" else segment_module(piece, block)


def dit_graph_names(num_layers: int) -> list[str]:
    """Names of the graphs that a denoising step and its preparation need."""
    per_layer = [f"dit_{kind}_{i:02d}" for kind in ("cross", "block") for i in range(num_layers)]
    return ["dit_context", "dit_embed", *per_layer, "dit_final"]


def _text(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> list[Component]:
    from stepvideo_serve.text.graphs import hunyuan_clip_spec, step_llm_spec  # imports transformers, which takes long

    return [
        Component(step_llm_spec(checkpoint.llm_config, name), "llm", "", lambda: checkpoint.step_llm(dtype)),
        Component(hunyuan_clip_spec(checkpoint.clip_config, name), "clip", "", lambda: checkpoint.clip(dtype)),
    ]


def _vae(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> list[Component]:
    config = checkpoint.vae_config
    return [
        Component(vae_encoder_spec(config, name), "vae", "encoder.", lambda: checkpoint.vae_encoder(dtype)),
        Component(vae_decoder_spec(config, name), "vae", "decoder.", lambda: checkpoint.vae_decoder(dtype)),
    ]


def _dit(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> list[Component]:
    config = checkpoint.dit_config

    def outer(spec: EngineSpec, graph: Callable[..., nn.Module]) -> Component:
        return Component(spec, "dit", "", lambda: graph(checkpoint.dit_outer(dtype)))

    def block(index: int) -> Component:
        prefix = f"{BLOCKS_PREFIX}{index}."
        return Component(block_spec(config, name, index), "dit", prefix, lambda: checkpoint.dit_block(index, dtype))

    def cross(index: int) -> Component:
        prefix = f"{BLOCKS_PREFIX}{index}."
        spec = cross_spec(config, name, index)
        return Component(spec, "dit", prefix, lambda: CrossGraph(checkpoint.dit_block(index, dtype)))

    layers = range(config.num_layers)
    return [
        outer(context_spec(config, name), ContextGraph),
        *(cross(i) for i in layers),
        outer(embed_spec(config, name), EmbedGraph),
        *(block(i) for i in layers),
        outer(final_spec(config, name), FinalGraph),
    ]
