"""Which graphs an export with weights as inputs makes: one of a kind, for all layers that differ in numbers only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from export.graphs.placement import export_plan
from export.quantize.fp8 import Fp8
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import Component, llm_layer_components
from stepvideo_serve.dit.segments import CORE
from stepvideo_serve.engine.manifest import split_layer
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.fused.layers import DIT_LINEARS, LLM_LINEARS, SHARED_CORE, belongs, is_kept
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.text.step_llm import LAYERS_PREFIX

WHOLE_GRAPHS = "vae_"  # the graphs that keep their weights: TensorRT wants those of convolutions as constants

_LLM_HALVES = {"step_llm_attn": "attention.", "step_llm_ff": "feed_forward."}


@dataclass(frozen=True)
class Kind:
    """One graph and the layers that share it, or one that is no layer's (the layer None).

    parts  tensor-parallel ranks that the graph holds a slice for
    """

    name: str
    layers: Mapping[int | None, str]
    parts: int

    @property
    def takes_weights(self) -> bool:
        return not self.name.startswith(WHOLE_GRAPHS)

    @property
    def numbers(self) -> list[int]:
        return [layer for layer in self.layers if layer is not None]

    def named(self, spec: EngineSpec) -> EngineSpec:
        """The spec of one of its layers under its own name."""
        return replace(spec, name=self.name)


def shared_components(
    checkpoint: Checkpoint, precision: str, layout: Layout, split_llm: bool
) -> tuple[dict[str, Component], frozenset[str]]:
    """Every graph that a rank of `layout` runs, Step-LLM in layers, and the names of those that hold a slice: the first
    rank's stand for all."""
    tables = list(export_plan(checkpoint, Path(), precision, layout, split_llm).values())
    whole, own = tables[0], tables[1] if len(tables) > 1 else {}
    found: dict[str, Component] = {}
    for name, component in whole.items():
        found |= llm_layer_components(checkpoint, precision) if name == "step_llm" else {name: component}
    return found | own, frozenset(own)


def kinds_of(table: Mapping[str, Component], sliced: frozenset[str], layout: Layout, fp8: Fp8 | None) -> list[Kind]:
    """The components by kind. Layers that keep other parts in bf16 are variants: "dit_block", "dit_block.2", ..."""
    groups: dict[str, dict[frozenset[str], dict[int | None, str]]] = {}
    for name, component in table.items():
        kind, layer = split_layer(name)
        kept = frozenset[str]() if fp8 is None else kept_in(component, fp8.keep)
        groups.setdefault(kind, {}).setdefault(kept, {})[layer] = name
    return [
        Kind(kind if index == 0 else f"{kind}.{index + 1}", layers, layout.tp if _first(layers) in sliced else 1)
        for kind, variants in groups.items()
        for index, layers in enumerate(variants.values())
    ]


def kept_in(component: Component, globs: Iterable[str]) -> frozenset[str]:
    """The layers of a graph that are not quantised, by their names without the number."""
    layer = split_layer(component.name)[1]
    if component.name.startswith(CORE):
        return frozenset({SHARED_CORE}) if is_kept(SHARED_CORE, tuple(globs)) else frozenset()
    if layer is None:
        return frozenset()
    prefix = component.prefix if component.part == "dit" else f"{LAYERS_PREFIX}{layer}."
    half = _LLM_HALVES.get(split_layer(component.name)[0], "")
    local = (*DIT_LINEARS, "attn1.core") if component.part == "dit" else LLM_LINEARS
    names = {name: prefix + name for name in local}
    own = (name for name, full in names.items() if name.startswith(half) and belongs(component, full))
    return frozenset(name for name in own if is_kept(names[name], tuple(globs)))


def _first(layers: Mapping[int | None, str]) -> str:
    return next(iter(layers.values()))
