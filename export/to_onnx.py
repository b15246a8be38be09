"""Checkpoint -> ONNX graphs, one at a time.

    python -m export.to_onnx --model-dir DIR --out DIR [--only GLOB ...] [--precision fp32|bf16|fp16] [--layout tp4]
    python -m export.to_onnx ... --precision fp8 --calibration FILE [--keep-bf16 GLOB ...]
    python -m export.to_onnx ... --weights input [--list]
    python -m export.to_onnx ... --sm 90 --toolkit tensorrt [--ops auto|plugin|native|reference]

With a layout that splits heads or tokens, the pieces of each tensor-parallel rank go to a folder of their own below
--out (tp0of4, tp1of4, ...); everything that all ranks share stays in --out. With --weights input there is one graph of
each kind, its weights inputs, for all layers and ranks of a layout: all in --out.

Writes `<graph>.onnx` with its weights beside it in `<graph>.onnx.data`, and `manifest.json`. Each graph has passed
the ONNX checker and agrees with the torch module through ONNX Runtime at two shapes (bf16 and FP8 graphs as their fp16
twin, see compare/one_graph.py). A graph is there whole or not at all; run again, only graphs whose weights, code,
precision, calibration or exporter changed are built.
"""

import argparse
import fnmatch
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from tqdm import tqdm

from export.compare.one_graph import compare_plugins, compare_with_eager
from export.engines.toolkit import check_target
from export.graphs.placement import export_plan
from export.graphs.preview_fit import fit_preview
from export.graphs.recipe import CONSTANT, INPUT, PRECISIONS, TOOLS, WEIGHTS, Recipe
from export.graphs.shared import SharedExporter, plan_shared
from export.graphs.writer import check_graph, make_entry, write_graph
from export.quantize.calibration import Calibration
from export.quantize.fp8 import Fp8, Linears, count_quantized
from export.quantize.weights import check_weights
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import Component
from stepvideo_serve.engine.manifest import LOOP, GraphEntry, Manifest
from stepvideo_serve.engine.parity import WEIGHTS as WEIGHTS_OF_LOOP
from stepvideo_serve.engine.parity import loops_of
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import EngineError, ExportError, SetupError
from stepvideo_serve.fused.kernels_package import require_kernels
from stepvideo_serve.parallel.layout import SINGLE, Layout

if TYPE_CHECKING:
    from stepvideo_kernels.choice import Target


def export_graphs(
    checkpoint: Checkpoint,
    out: Path,
    precision: str = "fp32",
    only: Sequence[str] | None = None,
    show_progress: bool = True,
    layout: Layout = SINGLE,
    split_llm: bool = False,
    recipe: Recipe | None = None,
) -> Manifest:
    """Brings the graphs whose names match a glob of `only` (all by default) up to date in `out`, and in a folder below
    it per tensor-parallel rank where `layout` splits heads or tokens; `split_llm`: Step-LLM there too, in slices.
    `recipe` says more than `precision`, and takes its place.

    Returns the manifest of `out`, which has also been saved. Raises ExportError when a graph fails its checks,
    ConfigError when the layout does not fit the model, and CheckpointError for the weights; finished graphs stay.
    """
    recipe = recipe or Recipe(precision)
    exporter = _Exporter(checkpoint, recipe, show_progress)
    if recipe.weights == INPUT:
        recipe.check(checkpoint)
        exporter.export_shared(out, only, layout, split_llm)
        return Manifest.load(out)
    tables = [export_plan(checkpoint, out, name, layout, split_llm) for name in exporter.precisions]
    chosen = _chosen({name for table in tables[0].values() for name in table}, only)
    recipe.check(checkpoint)
    for folder in tables[0]:
        wanted = {name: tuple(table[folder][name] for table in tables) for name in tables[0][folder] if name in chosen}
        exporter.export_folder(folder, wanted)
    return Manifest.load(out)


def _chosen(names: Collection[str], only: Sequence[str] | None) -> set[str]:
    """Those that match a glob. Raises ExportError for none."""
    chosen = {name for name in names if only is None or any(fnmatch.fnmatch(name, glob) for glob in only)}
    if not chosen:
        raise ExportError(f"--only must match at least one graph, {only} matches none of {', '.join(sorted(names))}.")
    return chosen


Versions = tuple[Component, ...]
"""One graph in the precision of the export, in the precision of its check, and in fp32."""


class _Exporter:
    """Exports folder by folder as the recipe says."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, show_progress: bool) -> None:
        self._checkpoint, self._recipe, self._show_progress = checkpoint, recipe, show_progress
        self.precisions = (recipe.base, recipe.check_precision, "fp32")

    def export_folder(self, out: Path, wanted: Mapping[str, Versions]) -> None:
        """Brings the graphs of one folder and its manifest up to date."""
        out.mkdir(parents=True, exist_ok=True)
        manifest = self._open_manifest(out)
        keys = {name: self._recipe.key(graph[0], self._checkpoint) for name, graph in wanted.items()}
        stale = [name for name in wanted if not self._is_current(manifest, out, name, keys[name])]
        bar = tqdm(stale, desc=f"export {out.name}", unit="graph", disable=not self._show_progress, file=sys.stderr)
        for name in bar:
            entry = self._export_one(wanted[name], keys[name], out)
            manifest = replace(manifest, graphs={**manifest.graphs, name: entry})
            manifest.save(out)
        self._finish(manifest, out, "vae_encoder" in stale)

    def export_shared(self, out: Path, only: Sequence[str] | None, layout: Layout, split_llm: bool) -> None:
        """The same for graphs of a kind, all of which lie in `out`: a kind serves every rank."""
        out.mkdir(parents=True, exist_ok=True)
        plan = plan_shared(self._checkpoint, self._recipe, layout, split_llm)
        chosen = _chosen(plan.kinds, only)
        manifest = self._open_manifest(out)
        manifest = replace(
            manifest, graphs={name: manifest.graphs[name] for name in plan.kinds if name in manifest.graphs}
        )
        exporter = SharedExporter(self._checkpoint, self._recipe, plan)
        kinds = [kind for kind in plan.kinds.values() if kind.name in chosen]
        for kind in tqdm(kinds, desc="export", unit="graph", disable=not self._show_progress, file=sys.stderr):
            if kind.takes_weights:
                entry = exporter.entry(kind, out, manifest)
            else:
                graph = plan.versions(kind.name)
                key = self._recipe.key(graph[0], self._checkpoint)
                current = self._is_current(manifest, out, kind.name, key)
                entry = manifest.graphs[kind.name] if current else self._export_one(graph, key, out)
            manifest = replace(manifest, graphs={**manifest.graphs, kind.name: entry})
            manifest.save(out)
        self._finish(manifest, out, "vae_encoder" in chosen)

    def _finish(self, manifest: Manifest, out: Path, new_encoder: bool) -> None:
        if "preview" not in manifest.extra or new_encoder:
            manifest = replace(manifest, extra={**manifest.extra, "preview": fit_preview(self._checkpoint)})
        manifest.save(out)

    def _open_manifest(self, out: Path) -> Manifest:
        """The manifest so far where it is of the same precision, else a fresh one."""
        checkpoint, precision = self._checkpoint, self._recipe.precision
        identity = checkpoint.identity
        fresh = Manifest(
            checkpoint=identity,
            precision=precision,
            tools={name: version(name) for name in TOOLS},
            graphs={},
            extra={"dit_config": asdict(checkpoint.dit_config), "settings": checkpoint.settings} | self._fp8_extra(),
        )
        try:
            found = Manifest.load(out)
        except EngineError:
            return fresh
        if found.precision != precision:
            raise ExportError(
                f"{out} must hold graphs in {precision}, found {found.precision}: choose another --out, or delete it."
            )
        extra = {key: value for key, value in found.extra.items() if key != LOOP and found.checkpoint == identity}
        extra |= self._loops(found, identity)
        if self._recipe.weights != INPUT:  # entries of a kind would stand beside those of its layers
            found = replace(found, graphs={name: one for name, one in found.graphs.items() if not one.spec.weights})
        return replace(fresh, graphs=found.graphs, extra={**extra, **fresh.extra})

    def _loops(self, found: Manifest, identity: str) -> dict[str, Any]:
        """The reports on loops that still count: those through graphs with weights as inputs name these themselves, of
        whatever checkpoint they are."""
        shared = self._recipe.weights == INPUT
        loops = [loop for loop in loops_of(found) if (WEIGHTS_OF_LOOP in loop) == shared]
        if not loops or not (shared or found.checkpoint == identity):
            return {}
        return {LOOP: loops if shared else loops[0]}

    def _fp8_extra(self) -> dict[str, Any]:
        fp8 = self._recipe.fp8
        if fp8 is None:
            return {}
        return {"fp8": {"keep_bf16": sorted(fp8.keep), "calibration": dict(fp8.calibration.settings)}}

    def _is_current(self, manifest: Manifest, out: Path, name: str, key: str) -> bool:
        entry = manifest.graphs.get(name)
        if entry is None or entry.key != key or (self._recipe.compare and not entry.extras.get("parity")):
            return False
        return all((out / f.path).is_file() and (out / f.path).stat().st_size == f.size_bytes for f in entry.files)

    def _export_one(self, graph: Versions, key: str, out: Path) -> GraphEntry:
        """Builds one graph and checks it."""
        component = graph[0]

        def write(path: Path) -> tuple[EngineSpec, dict[str, Any]]:
            extras = self._write(graph, path)
            if "parity" not in extras:
                extras["parity"] = self._compare(graph, path)
            if self._recipe.fp8 is not None and self._recipe.compare:
                check_weights(component.name, path, graph[2].load())
            return component.spec, extras

        return make_entry(out, component.name, key, write)

    def _write(self, graph: Versions, path: Path) -> dict[str, Any]:
        """Writes the graph and returns what is known of it; its module is not kept."""
        component = graph[0]
        built = self._recipe.build(component, self._checkpoint)
        write_graph(built.module, component.spec, path, built.table)
        check_graph(component.spec, path)
        extras: dict[str, Any] = {"ops": built.ops} if built.ops else {}
        if self._recipe.fp8 is not None:
            extras["fp8"] = count_quantized(onnx.load(str(path), load_external_data=False).graph)
        if built.needs_tensorrt and self._recipe.compare:
            measure = self._recipe.same_precision(component)
            extras["parity"] = compare_plugins(component.spec, built.module, graph[2].load, measure)
        return extras

    def _compare(self, graph: Versions, path: Path) -> list[dict[str, Any]]:
        component, check, wide = graph
        if not self._recipe.compare:
            return []
        measure = None if self._recipe.precision == "fp32" else self._recipe.same_precision(check)
        compiled = self._recipe.target is not None
        return compare_with_eager(component.spec, path, wide.load, measure, compiled)


def _listed(arguments: argparse.Namespace) -> str:
    """The graphs of a layout by name, each as often as there are files of it."""
    checkpoint, layout = Checkpoint(arguments.model_dir), Layout.parse(arguments.layout)
    recipe = _recipe(arguments)
    if recipe.weights == INPUT:
        names = list(plan_shared(checkpoint, recipe, layout, arguments.split_llm).kinds)
    else:
        tables = export_plan(checkpoint, arguments.out, recipe.base, layout, arguments.split_llm)
        names = [str((folder / name).relative_to(arguments.out)) for folder, table in tables.items() for name in table]
    return "\n".join([*names, f"{len(names)} graphs for layout {layout}"])


def _summary(manifest: Manifest, out: Path) -> str:
    rows = [f"{'graph':<18} {'MiB':>8} {'seconds':>8}  worst error / allowed"]
    for name, entry in manifest.graphs.items():
        size = sum(file.size_bytes for file in entry.files) / 2**20
        worst: dict[str, Any] = max(entry.extras["parity"], key=lambda row: row["error"], default={})
        shown = f"{worst['error']:.1e} / {worst['allowed']:.1e}" if worst else "not compared"
        rows.append(f"{name:<18} {size:>8.1f} {entry.extras['seconds']:>8.1f}  {shown}")
    return "\n".join([*rows, f"{len(manifest.graphs)} graphs in {manifest.precision} in {out}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.to_onnx", description="Export a checkpoint to ONNX graphs.")
    parser.add_argument("--model-dir", type=Path, required=True, help="checkpoint in the official layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for the graphs and their manifest")
    parser.add_argument("--only", nargs="+", metavar="GLOB", help='graphs to export, such as "dit_block_*"')
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="from export.calibrate, for fp8")
    parser.add_argument(
        "--keep-bf16", nargs="+", default=[], metavar="GLOB", help='layers not to quantise, such as "*.ff.net.2"'
    )
    parser.add_argument("--ops", default="auto", help="fused operators: auto, plugin, native or reference")
    parser.add_argument("--sm", type=int, help="architecture to compile for, such as 89; for fused operators")
    parser.add_argument("--toolkit", choices=("tensorrt", "tensorrt_rtx"), help="what compiles, with --sm")
    parser.add_argument("--layout", default="single", help='how ranks share the DiT, such as "cfg2.tp4"')
    parser.add_argument("--split-llm", action="store_true", help="cut Step-LLM for tensor parallelism too")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default=CONSTANT, help="in every graph, or inputs of one graph of each kind"
    )
    parser.add_argument("--no-compare", action="store_true", help="do not compare with torch: needs the least memory")
    parser.add_argument("--list", action="store_true", help="only print the graphs that the layout needs, and how many")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _recipe(arguments: argparse.Namespace) -> Recipe:
    fp8 = None
    if arguments.calibration is not None:
        linears: Linears = "nvfp4" if arguments.precision == "nvfp4" else "fp8"
        fp8 = Fp8(Calibration.load(arguments.calibration), tuple(arguments.keep_bf16), linears)
    elif arguments.keep_bf16:
        raise ExportError("--keep-bf16 goes with --precision fp8 or nvfp4 and --calibration, got none: add them.")
    target, compare = _target(arguments), not arguments.no_compare
    return Recipe(arguments.precision, fp8, arguments.ops, target, compare, arguments.weights)


def _target(arguments: argparse.Namespace) -> "Target | None":
    if arguments.sm is None and arguments.toolkit is None:
        return None
    if arguments.sm is None or arguments.toolkit is None:
        raise ExportError("--sm and --toolkit go together, got one of them: add the other.")
    check_target(arguments.toolkit, arguments.sm, arguments.precision)  # now, and not when all graphs are there
    require_kernels("--sm")
    from stepvideo_kernels.choice import Target

    return Target(arguments.sm, arguments.toolkit)


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit status; argparse itself leaves with 2."""
    arguments = _parser().parse_args(given)
    try:
        if arguments.list:
            print(_listed(arguments))
            return 0
        manifest = export_graphs(
            Checkpoint(arguments.model_dir),
            arguments.out,
            only=arguments.only,
            show_progress=not arguments.quiet,
            layout=Layout.parse(arguments.layout),
            split_llm=arguments.split_llm,
            recipe=_recipe(arguments),
        )
    except SetupError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"export: {arguments.out} must be writable with room for the graphs, got: {error}", file=sys.stderr)
        return 2
    print(_summary(manifest, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
