"""Checkpoint -> ONNX graphs, one at a time.

    python -m export.to_onnx --model-dir DIR --out DIR [--only GLOB ...] [--precision fp32|bf16|fp16] [--layout tp4]

With a layout that splits heads or tokens, the pieces of each tensor-parallel rank go to a folder of their own below
--out (tp0of4, tp1of4, ...); everything that all ranks share stays in --out.

Writes `<graph>.onnx` with its weights beside it in `<graph>.onnx.data`, and `manifest.json`. Each graph has passed
the ONNX checker and agrees with the torch module through ONNX Runtime at two shapes. A graph is there whole or not at
all; run again, only graphs whose weights, code, precision or exporter changed are built.
"""

import argparse
import fnmatch
import gc
import hashlib
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from tqdm import tqdm

import stepvideo_serve
from export.compare import compare_with_eager
from export.preview_fit import fit_preview
from export.samples import SMALL_SIZES, sample_inputs
from stepvideo_serve.components import (
    DTYPES,
    Component,
    components,
    core_component,
    llm_part_components,
    part_components,
    sharded_graph_names,
)
from stepvideo_serve.engine.manifest import GraphEntry, GraphFile, Manifest, content_key
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import ConfigError, EngineError, ExportError, SetupError
from stepvideo_serve.parallel.layout import SINGLE, Layout, part_folder
from stepvideo_serve.sharding import TensorPart
from stepvideo_serve.weights.checkpoint import Checkpoint

OPSET = 23
SOURCES = ("dit/*.py", "text/*.py", "vae/*.py", "sharding.py")
TOOLS = ("torch", "onnx", "onnxscript", "transformers")


def export_graphs(
    checkpoint: Checkpoint,
    out: Path,
    precision: str = "fp32",
    only: Sequence[str] | None = None,
    show_progress: bool = True,
    layout: Layout = SINGLE,
    split_llm: bool = False,
) -> Manifest:
    """Brings the graphs whose names match a glob of `only` (all by default) up to date in `out`, and in a folder below
    it per tensor-parallel rank where `layout` splits heads or tokens; `split_llm`: Step-LLM there too, in slices.

    Returns the manifest of `out`, which has also been saved. Raises ExportError when a graph fails its checks,
    ConfigError when the layout does not fit the model, and CheckpointError for the weights; finished graphs stay.
    """
    plan = export_plan(checkpoint, out, precision, layout, split_llm)
    known = sorted({name for table in plan.values() for name in table})
    chosen = {name for name in known if only is None or any(fnmatch.fnmatch(name, glob) for glob in only)}
    if not chosen:
        raise ExportError(f"--only must match at least one graph, {only} matches none of {', '.join(known)}.")
    for folder, table in plan.items():
        wanted = {name: component for name, component in table.items() if name in chosen}
        _export_folder(checkpoint, folder, wanted, precision, show_progress)
    return Manifest.load(out)


def export_plan(
    checkpoint: Checkpoint, out: Path, precision: str, layout: Layout, split_llm: bool
) -> dict[Path, dict[str, Component]]:
    """Which graphs go to which folder, `out` first."""
    config = checkpoint.dit_config
    layout.check(config.num_heads, llm_groups=checkpoint.llm_config.num_groups if split_llm else None)
    if split_llm and layout.tp == 1:
        raise ConfigError(
            f"--split-llm needs a layout with tensor parallelism, got {layout}: add tp2, or leave it out."
        )
    whole = components(checkpoint, precision)
    if layout.tp == layout.sp == 1:
        return {out: whole}
    common, _ = sharded_graph_names(config, layout.tp, layout.sp)
    shared = {name: part for name, part in whole.items() if not name.startswith("dit_") or name in common}
    if layout.sp > 1:
        core = core_component(precision, config.num_heads // (layout.tp * layout.sp))
        shared[core.name] = core
    parts = {
        out / part_folder(layout, index): part_components(
            checkpoint, precision, TensorPart(index, layout.tp), sequence=layout.sp > 1
        )
        for index in range(layout.tp)
    }
    if split_llm:
        del shared["step_llm"]
        for index, table in enumerate(parts.values()):
            table |= llm_part_components(checkpoint, precision, TensorPart(index, layout.tp))
    return {out: shared, **parts}


def _export_folder(
    checkpoint: Checkpoint, out: Path, table: dict[str, Component], precision: str, show_progress: bool
) -> None:
    chosen = list(table)
    out.mkdir(parents=True, exist_ok=True)
    manifest = _open_manifest(out, checkpoint, precision)
    keys = {name: _graph_key(table[name], checkpoint, precision) for name in chosen}
    stale = [name for name in chosen if not _is_current(manifest, out, name, keys[name])]
    for name in tqdm(stale, desc=f"export {out.name}", unit="graph", disable=not show_progress, file=sys.stderr):
        entry = _export_one(table[name], keys[name], out, precision)
        manifest = replace(manifest, graphs={**manifest.graphs, name: entry})
        manifest.save(out)
    if "preview" not in manifest.extra or "vae_encoder" in stale:
        manifest = replace(manifest, extra={**manifest.extra, "preview": fit_preview(checkpoint)})
    manifest.save(out)


def _open_manifest(out: Path, checkpoint: Checkpoint, precision: str) -> Manifest:
    """The manifest so far where it is of the same precision, else a fresh one."""
    identity = content_key(**{part: checkpoint.digest(part) for part in ("dit", "llm", "clip", "vae")})
    fresh = Manifest(
        checkpoint=identity,
        precision=precision,
        tools={name: version(name) for name in TOOLS},
        graphs={},
        extra={"dit_config": asdict(checkpoint.dit_config)},
    )
    try:
        found = Manifest.load(out)
    except EngineError:
        return fresh
    if found.precision != precision:
        raise ExportError(
            f"{out} must hold graphs in {precision}, found {found.precision}: choose another --out, or delete it."
        )
    extra = found.extra if found.checkpoint == identity else {}
    return replace(fresh, graphs=found.graphs, extra={**extra, **fresh.extra})


def _graph_key(component: Component, checkpoint: Checkpoint, precision: str) -> str:
    return content_key(
        weights=checkpoint.digest(component.part, component.prefix),
        spec=component.spec.to_json(),
        precision=precision,
        opset=OPSET,
        code=_source_digest(),
        tools={name: version(name) for name in TOOLS},
    )


def _source_digest() -> str:
    """SHA-256 over the code of the networks: an edit there makes every graph stale."""
    package = Path(stepvideo_serve.__file__).parent
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(package.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _is_current(manifest: Manifest, out: Path, name: str, key: str) -> bool:
    entry = manifest.graphs.get(name)
    if entry is None or entry.key != key:
        return False
    return all((out / f.path).is_file() and (out / f.path).stat().st_size == f.size_bytes for f in entry.files)


def _export_one(component: Component, key: str, out: Path, precision: str) -> GraphEntry:
    """Builds one graph in a folder of its own, checks it there, and moves it in."""
    began_s = time.monotonic()
    workshop = out / f".{component.name}.partial"
    shutil.rmtree(workshop, ignore_errors=True)
    workshop.mkdir()
    try:
        module = component.load()
        path = workshop / f"{component.name}.onnx"
        write_graph(module, component.spec, path)
        _check_graph(component.spec, path)
        parity = compare_with_eager(component.spec, module, path, precision)
        for file in sorted(workshop.iterdir(), reverse=True):  # weights first: the graph file makes it complete
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
        gc.collect()
    names = [f"{component.name}.onnx", f"{component.name}.onnx.data"]
    files = tuple(GraphFile.of(out, name) for name in names if (out / name).is_file())
    return GraphEntry(files, key, component.spec, {"parity": parity, "seconds": round(time.monotonic() - began_s, 2)})


def write_graph(module: nn.Module, spec: EngineSpec, path: Path) -> None:
    """One module as `path` with its weights beside it, traced with small inputs; sizes in `spec.dims` stay open."""
    inputs = sample_inputs(spec, SMALL_SIZES)
    with _quiet_exporter():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple(spec.dynamic_shapes().values()),
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            verbose=False,
        )
    if program is None:
        raise ExportError(f"{spec.name} must export to an ONNX program, the exporter returned none: run it alone.")
    program.save(str(path), external_data=True)


def _check_graph(spec: EngineSpec, path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{spec.name} must pass the ONNX checker, got: {error}") from None


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs about torchvision and warns about its own internals; errors still raise."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _summary(manifest: Manifest, out: Path) -> str:
    rows = [f"{'graph':<18} {'MiB':>8} {'seconds':>8}  worst error / allowed"]
    for name, entry in manifest.graphs.items():
        size = sum(file.size_bytes for file in entry.files) / 2**20
        worst: dict[str, Any] = max(entry.extras["parity"], key=lambda row: row["error"], default={})
        shown = f"{worst['error']:.1e} / {worst['allowed']:.1e}" if worst else "not run (no bf16 in ONNX Runtime)"
        rows.append(f"{name:<18} {size:>8.1f} {entry.extras['seconds']:>8.1f}  {shown}")
    return "\n".join([*rows, f"{len(manifest.graphs)} graphs in {manifest.precision} in {out}"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m export.to_onnx", description="Export a checkpoint to ONNX graphs.")
    parser.add_argument("--model-dir", type=Path, required=True, help="checkpoint in the official layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for the graphs and their manifest")
    parser.add_argument("--only", nargs="+", metavar="GLOB", help='graphs to export, such as "dit_block_*"')
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--layout", default="single", help='how ranks share the DiT, such as "cfg2.tp4"')
    parser.add_argument("--split-llm", action="store_true", help="cut Step-LLM for tensor parallelism too")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args()
    try:
        manifest = export_graphs(
            Checkpoint(arguments.model_dir),
            arguments.out,
            arguments.precision,
            arguments.only,
            not arguments.quiet,
            Layout.parse(arguments.layout),
            arguments.split_llm,
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
