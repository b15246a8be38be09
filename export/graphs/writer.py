"""Writes one module as an ONNX file and checks the file."""

import gc
import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from export.graphs.example_inputs import SMALL_SIZES, sample_inputs
from export.graphs.recipe import OPSET
from export.graphs.translation import Table, type_codes
from export.graphs.weight_inputs import WeightsOutside, state_of
from stepvideo_serve.engine.manifest import GraphEntry, GraphFile
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import ExportError


def write_graph(module: nn.Module, spec: EngineSpec, path: Path, table: Table | None = None) -> EngineSpec:
    """One module as `path` with its weights beside it, traced with small inputs; sizes in `spec.dims` stay open, and
    the weights that `spec` names are inputs. `table` translates operators that are not torch's own.

    Returns the spec with those of its weights that the graph uses."""
    inputs = sample_inputs(spec, SMALL_SIZES)
    shapes: tuple[Any, ...] = tuple(spec.dynamic_shapes().values())
    values = [state_of(module)[weight.name] for weight in spec.weights]
    if spec.weights:
        module, shapes = WeightsOutside(module, spec), ((*shapes, *({} for _ in values)),)
    with _quiet_exporter():
        program = torch.onnx.export(
            module,
            (*inputs.values(), *values),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=[*inputs, *(weight.name for weight in spec.weights)],
            output_names=[tensor.name for tensor in spec.outputs],
            custom_translation_table=dict(table or {}),
            verbose=False,
        )
    if program is None:
        raise ExportError(f"{spec.name} must export to an ONNX program, the exporter returned none: run it alone.")
    program.save(str(path), external_data=True)
    return _finish(path, program.exported_program, spec)


def make_entry(
    out: Path, name: str, key: str, write: Callable[[Path], tuple[EngineSpec, dict[str, Any]]]
) -> GraphEntry:
    """Has `write` make the graph in a folder of its own, from where it is moved into `out` whole; what `write` returns
    joins the entry."""
    began_s = time.monotonic()
    workshop = out / f".{name}.partial"
    shutil.rmtree(workshop, ignore_errors=True)
    workshop.mkdir()
    try:
        spec, extras = write(workshop / f"{name}.onnx")
        for file in sorted(workshop.iterdir(), reverse=True):  # weights first: the graph file makes it complete
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
        gc.collect()
    files = tuple(GraphFile.of(out, file) for file in (f"{name}.onnx", f"{name}.onnx.data") if (out / file).is_file())
    return GraphEntry(files, key, spec, extras | {"seconds": round(time.monotonic() - began_s, 2)})


def _finish(path: Path, program: torch.export.ExportedProgram | None, spec: EngineSpec) -> EngineSpec:
    """Gives packed weights their type, and the sizes inside the graph the names of `spec`, by which plans are checked.
    The exporter has names of its own for a symbol that no axis has without a factor, such as latent_height in
    pixels [.., 16*latent_height, ..]."""
    if program is None:
        raise ExportError(f"{spec.name} must come with its exported program, the exporter gave none: run it alone.")
    nodes = {node.name: node for node in program.graph.nodes}
    names: dict[str, str] = {}
    for name, tensor in zip(program.graph_signature.user_inputs, spec.inputs, strict=not spec.weights):
        for size, dim in zip(nodes[str(name)].meta["val"].shape, tensor.shape, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(dim, str):
                names |= {str(symbol): dim.rpartition("*")[2] for symbol in size.node.expr.free_symbols}
    model = onnx.load(str(path), load_external_data=bool(spec.weights))  # what is left then is small, and stays inside
    for value in (*model.graph.value_info, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), size.dim_param)
    type_codes(model)
    if spec.weights:
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    used = {name for node in model.graph.node for name in node.input}
    unused = {weight.name for weight in spec.weights} - used
    kept = [value for value in model.graph.input if value.name not in unused]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.save(model, str(path))
    return replace(spec, weights=tuple(weight for weight in spec.weights if weight.name in used))


def check_graph(spec: EngineSpec, path: Path) -> None:
    """Raises ExportError unless the file of a graph passes the checker of ONNX."""
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
