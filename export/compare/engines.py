"""What engines lose against torch in fp32: the reports in their manifests, and what they give on this machine's GPU.

On the GPU each engine gets the inputs on which its graph was compared (one_graph.py), rounded to its dtypes. It may
lose twice what torch loses in these, with the same layers quantised. The rows join the graph's own report in the
manifest, with "engine" as their backend: a server refuses the engine when one of them fails. All outputs, those of the
graph in ONNX Runtime among them where it is there, are kept beside the logs as Polygraphy's JSON.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import onnx

from export.compare.fp16_copy import write_fp16_twin
from export.compare.one_graph import compare_engine
from export.graphs.placement import export_plan
from export.graphs.recipe import INPUT, QUANTIZED, Recipe
from export.graphs.shared import SharedExporter, plan_shared
from export.graphs.weight_inputs import values_of
from export.parity import graph_failures, graph_table, loop_failures, loop_table
from export.quantize.calibration import Calibration
from export.quantize.fp8 import Fp8, Linears
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.graphs import Component
from stepvideo_serve.engine.manifest import FILE_NAME, GRAPH, LOOP, EngineTarget, GraphEntry, Manifest
from stepvideo_serve.engine.parity import WEIGHTS
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.errors import ExportError
from stepvideo_serve.fused.kernels_package import require_kernels
from stepvideo_serve.parallel.layout import Layout

if TYPE_CHECKING:
    from stepvideo_kernels.choice import Target

Open = Callable[..., EngineRunner]
"""From the name of an engine, and the weights of a layer where it takes them, to what runs it."""
Opener = Callable[[Path, Manifest], Open]
"""From a folder of engines to what opens one by its name."""
ENGINE = "engine"
AUTO = "auto"
GRAPHS = "onnx"  # where `make engines` puts the graphs, below the engines


def report(directory: Path) -> tuple[list[str], bool]:
    """Lines: the tables of an engine directory and of its ranks' folders, then what fails; whether nothing does. Raises
    EngineError where there are no engines."""
    EngineTarget.of(Manifest.load(directory), directory)
    lines, failed = [], []
    for folder in _folders(directory):
        manifest = Manifest.load(folder)
        lines += [f"{folder}: {manifest.precision}, {EngineTarget.of(manifest, folder)}", *graph_table(manifest), ""]
        failed += graph_failures(manifest)
        if LOOP in manifest.extra:
            lines += [*loop_table(manifest), ""]
            failed += loop_failures(manifest)
    return [*lines, *failed], not failed


def compare_engines(directory: Path, model_dir: Path, calibration: Path | None, opener: Opener) -> None:
    """Runs every engine below `directory`, made from the checkpoint in `model_dir`, and records its rows.

    calibration  the file that quantised engines were made with
    Raises ExportError or CheckpointError for what does not belong together, EngineError when an engine does not run.
    """
    comparison = _Comparison.of(directory, Checkpoint(model_dir), calibration)
    for folder in _folders(directory):
        manifest = Manifest.load(folder)
        open_engine = opener(folder, manifest)
        for name, entry in manifest.graphs.items():
            print(f"verify: engine {folder.name}/{name}", file=sys.stderr, flush=True)
            compared = comparison.entry(folder, name, entry, open_engine)
            manifest = replace(manifest, graphs={**manifest.graphs, name: compared})
            manifest.save(folder)


def gpu_opener(directory: Path, manifest: Manifest) -> Open:
    """Opens engines on this machine's GPU. Raises ExportError where there is none, EngineError for other engines."""
    import torch

    if not torch.cuda.is_available():
        raise ExportError(
            f"--gpu runs the engines in {directory} on an NVIDIA GPU with its driver, found none: "
            "leave it out, or verify on the machine that serves."
        )
    from stepvideo_serve.assembly.engines import KERNELS_FOLDER, open_alone

    root = directory.parent if EngineTarget.of(manifest, directory).part else directory
    return open_alone(directory, manifest, root / KERNELS_FOLDER)


@dataclass(frozen=True)
class _Comparison:
    """Modules by folder and name: those of the engines' own precision, and those in fp32. `shared`: for engines that
    take their weights as inputs, and get those of the checkpoint here."""

    checkpoint: Checkpoint
    recipe: Recipe
    own: Mapping[Path, Mapping[str, Component]]
    wide: Mapping[Path, Mapping[str, Component]]
    shared: SharedExporter | None

    @classmethod
    def of(cls, directory: Path, checkpoint: Checkpoint, calibration: Path | None) -> "_Comparison":
        manifest = Manifest.load(directory)
        if manifest.checkpoint != checkpoint.identity and not manifest.takes_weights:
            raise ExportError(
                f"The engines in {directory} must be made from the checkpoint in {checkpoint.folder}, which is another "
                "or changed since: name theirs, or build them again."
            )
        recipe = _recipe(manifest, calibration)
        recipe.check(checkpoint)
        layout = Layout.parse(EngineTarget.of(manifest, directory).layout)
        graphs = [name for folder in _folders(directory) for name in Manifest.load(folder).graphs]
        split_llm = "step_llm_embed" in graphs and "step_llm_layer" not in graphs
        if manifest.takes_weights:
            target, ops = _fused_as(manifest, directory)
            recipe = replace(recipe, weights=INPUT, target=target, ops=ops)
            plan = plan_shared(checkpoint, recipe, layout, split_llm)
            exporter = SharedExporter(checkpoint, recipe, plan)
            return cls(checkpoint, recipe, {directory: plan.tables[0]}, {directory: plan.tables[-1]}, exporter)
        own, wide = (export_plan(checkpoint, directory, name, layout, split_llm) for name in (recipe.base, "fp32"))
        return cls(checkpoint, recipe, own, wide, None)

    def entry(self, folder: Path, name: str, entry: GraphEntry, open_engine: Open) -> GraphEntry:
        """The entry with the engine's rows in its report, in place of older ones."""
        if entry.spec.weights and self.shared is not None:
            return self._shared_entry(folder, name, entry, open_engine, self.shared)
        own, wide = (table[folder][entry.spec.name] for table in (self.own, self.wide))
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        with TemporaryDirectory(prefix=".twin-", dir=logs) as workshop, open_engine(name) as runner:
            twin = _twin(folder, entry, Path(workshop))
            rows = compare_engine(runner, wide.load, self.recipe.same_precision(own), twin, logs / name)
        kept = [row for row in entry.extras.get("parity", []) if row["backend"] != ENGINE]
        return replace(entry, extras={**entry.extras, "parity": [*kept, *rows]})

    def _shared_entry(
        self, folder: Path, name: str, entry: GraphEntry, open_engine: Open, shared: SharedExporter
    ) -> GraphEntry:
        """The same with rows of every layer, as far as they are of this checkpoint."""
        kind, rows = shared.plan.kinds[name], []
        weights = shared.identity(kind)
        for layer, one in kind.layers.items():
            own, wide = (table[folder][one] for table in (self.own, self.wide))
            given = values_of(self.recipe.build_shared(own, self.checkpoint).module, entry.spec)
            with open_engine(one, given) as runner:
                found = compare_engine(runner, wide.load, self.recipe.same_precision(own))
            rows += [{**row, WEIGHTS: weights} | ({} if layer is None else {"layer": layer}) for row in found]
        before = entry.extras.get("parity", [])
        kept = [row for row in before if row["backend"] != ENGINE or row[WEIGHTS] != weights]
        return replace(entry, extras={**entry.extras, "parity": [*kept, *rows]})


def _twin(folder: Path, entry: GraphEntry, workshop: Path) -> Path | None:
    """The graph that the engine was built from as ONNX Runtime runs it, where `make engines` left it and no operator of
    it is for TensorRT alone."""
    part = folder.name if folder.name.startswith("tp") else ""
    graphs = (folder.parent if part else folder) / GRAPHS / part
    plan = entry.extras.get("plan", {})
    if not (graphs / FILE_NAME).is_file() or plan.get("plugins") or plan.get("fp4_gemms"):
        return None
    source = Manifest.load(graphs).graphs.get(entry.spec.name)
    if source is None or source.key != entry.extras.get(GRAPH, entry.key):
        return None
    inputs = onnx.load(str(graphs / source.file), load_external_data=False).graph.input
    if {value.name for value in inputs} != {tensor.name for tensor in entry.spec.inputs}:
        return None  # its weights are inputs, which are bound apart
    twin = workshop / source.file
    write_fp16_twin(graphs / source.file, twin)
    return twin


def _recipe(manifest: Manifest, calibration: Path | None) -> Recipe:
    """What the engines were made with."""
    if manifest.precision not in QUANTIZED:
        return Recipe(manifest.precision)
    made_with = manifest.extra["fp8"]
    if calibration is None:
        raise ExportError(
            f"Engines in {manifest.precision} need the calibration that they were made with, got none: "
            "add --calibration FILE (make verify CALIBRATION=FILE)."
        )
    found = Calibration.load(calibration)
    if dict(found.settings) != made_with["calibration"]:
        raise ExportError(
            f"The engines were made with a calibration of {made_with['calibration']}, {calibration} is one of "
            f"{dict(found.settings)}: name theirs."
        )
    linears: Linears = "nvfp4" if manifest.precision == "nvfp4" else "fp8"
    return Recipe(manifest.precision, Fp8(found, tuple(made_with["keep_bf16"]), linears))


def _fused_as(manifest: Manifest, directory: Path) -> "tuple[Target | None, str]":
    """What the graphs of engines were exported for where they have plugins, whose weights have names of their own, and
    with which operators."""
    choices = [choice for entry in manifest.graphs.values() for choice in entry.extras.get("ops", {}).values()]
    plugins = [choice["implementation"] == "plugin" for choice in choices]
    if not any(plugins):
        return None, AUTO
    require_kernels("An engine with plugins")
    from stepvideo_kernels.choice import Target

    found = EngineTarget.of(manifest, directory)
    return Target(found.sm, found.backend), "plugin" if all(plugins) else AUTO


def _folders(directory: Path) -> list[Path]:
    """`directory` and the folders of its tensor-parallel ranks."""
    return [directory, *sorted(file.parent for file in directory.glob(f"tp*of*/{FILE_NAME}"))]
