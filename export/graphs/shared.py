"""Exports graphs whose weights are inputs: one of a kind, compared with every layer that shares it.

A graph is built again when its code, shapes or constants change, not with the weights. Its parity report has rows for
each checkpoint and calibration that it was compared with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from export.compare.one_graph import compare_plugins, compare_with_eager
from export.graphs.kinds import Kind, kinds_of, shared_components
from export.graphs.recipe import Recipe
from export.graphs.weight_inputs import values_of, with_weights
from export.graphs.writer import check_graph, make_entry, write_graph
from export.quantize.fp8 import count_quantized
from export.quantize.weight_set import PARTS, calibration_digest
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import Component
from stepvideo_serve.engine.manifest import LAYERS, GraphEntry, Manifest, content_key
from stepvideo_serve.engine.parity import WEIGHTS
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.weights.weight_set import weights_identity


@dataclass(frozen=True)
class Plan:
    """The kinds by name, and all layers' graphs in the precision of the export, in that of its check, and in fp32."""

    kinds: Mapping[str, Kind]
    tables: tuple[Mapping[str, Component], ...]

    def versions(self, name: str) -> tuple[Component, ...]:
        """One layer's graph, or one that is no layer's, in the three precisions."""
        return tuple(table[name] for table in self.tables)


@dataclass(frozen=True)
class SharedExporter:
    """Makes the entries of the manifest."""

    checkpoint: Checkpoint
    recipe: Recipe
    plan: Plan

    def entry(self, kind: Kind, out: Path, manifest: Manifest) -> GraphEntry:
        """The entry of an up-to-date graph in `out`. Raises ExportError when it fails its checks."""
        key, weights = self._key(kind), self.identity(kind)
        entry = manifest.graphs.get(kind.name)
        if entry is None or entry.key != key or not _is_there(out, entry):
            entry = make_entry(out, kind.name, key, partial(self._write, kind))
        rows = list(entry.extras.get("parity", ()))
        if self.recipe.compare and not any(row[WEIGHTS] == weights for row in rows):
            new = [row for layer in kind.layers for row in self._compare(kind, layer, entry, out)]
            rows += [{**row, WEIGHTS: weights} for row in new]
        return replace(entry, extras={**entry.extras, LAYERS: kind.numbers, "parity": rows})

    def _first(self, kind: Kind) -> Component:
        return self.plan.versions(next(iter(kind.layers.values())))[0]

    def _write(self, kind: Kind, path: Path) -> tuple[EngineSpec, dict[str, Any]]:
        """Writes the graph from the weights of its first layer, of which none stays in it."""
        component = self._first(kind)
        built = self.recipe.build_shared(component, self.checkpoint)
        spec = kind.named(with_weights(component, built.module, self.checkpoint, kind.parts))
        spec = write_graph(built.module, spec, path, built.table)
        check_graph(spec, path)
        extras: dict[str, Any] = {"ops": built.ops} if built.ops else {}
        if self.recipe.fp8 is not None:
            extras["fp8"] = count_quantized(onnx.load(str(path), load_external_data=False).graph)
        return spec, extras

    def _compare(self, kind: Kind, layer: int | None, entry: GraphEntry, out: Path) -> list[dict[str, Any]]:
        """Rows of the graph with the weights of one layer, whose number each row has."""
        own, check, wide = self.plan.versions(kind.layers[layer])
        built = self.recipe.build_shared(own, self.checkpoint)
        measure = None if self.recipe.precision == "fp32" else self.recipe.same_precision(check)
        if built.needs_tensorrt:
            rows = compare_plugins(own.spec, built.module, wide.load, self.recipe.same_precision(own))
        else:
            values, compiled = values_of(built.module, entry.spec), self.recipe.target is not None
            rows = compare_with_eager(entry.spec, out / entry.file, wide.load, measure, compiled, values)
        return rows if layer is None else [{**row, "layer": layer} for row in rows]

    def _key(self, kind: Kind) -> str:
        """Equal keys make equal graphs; shapes of weights depend on the parts."""
        component = self._first(kind)
        return content_key(graph=self.recipe.key(component, self.checkpoint), parts=kind.parts, name=kind.name)

    def identity(self, kind: Kind) -> str:
        """What the rows of a parity report call the weights that they were made with."""
        fp8, part = self.recipe.fp8, self._first(kind).part
        quantised = fp8 is not None and part in PARTS
        calibration = calibration_digest(fp8.calibration) if fp8 is not None and quantised else None
        return weights_identity(self.checkpoint.digest(part), calibration)


def _is_there(out: Path, entry: GraphEntry) -> bool:
    files = [(out / file.path, file.size_bytes) for file in entry.files]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def plan_shared(checkpoint: Checkpoint, recipe: Recipe, layout: Layout, split_llm: bool) -> Plan:
    """Of all graphs that a rank of the layout runs."""
    precisions = (recipe.base, recipe.check_precision, "fp32")
    tables = [shared_components(checkpoint, name, layout, split_llm) for name in precisions]
    kinds = kinds_of(*tables[0], layout, recipe.fp8)
    return Plan({kind.name: kind for kind in kinds}, tuple(table for table, _ in tables))
