"""Writes one module as an ONNX file and checks the file."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch
from torch import nn

from export.graphs.example_inputs import SMALL_SIZES, sample_inputs
from export.graphs.recipe import OPSET
from export.graphs.translation import Table, type_codes
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import ExportError

if TYPE_CHECKING:
    pass


def write_graph(module: nn.Module, spec: EngineSpec, path: Path, table: Table | None = None) -> None:
    """One module as `path` with its weights beside it, traced with small inputs; sizes in `spec.dims` stay open.
    `table` translates operators that are not torch's own."""
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
            custom_translation_table=dict(table or {}),
            verbose=False,
        )
    if program is None:
        raise ExportError(f"{spec.name} must export to an ONNX program, the exporter returned none: run it alone.")
    program.save(str(path), external_data=True)
    _finish(path, program.exported_program, spec)


def _finish(path: Path, program: torch.export.ExportedProgram | None, spec: EngineSpec) -> None:
    """Gives packed weights their type, and the sizes inside the graph the names of `spec`, by which plans are checked.
    The exporter has names of its own for a symbol that no axis has without a factor, such as latent_height in
    pixels [.., 16*latent_height, ..]."""
    if program is None:
        raise ExportError(f"{spec.name} must come with its exported program, the exporter gave none: run it alone.")
    nodes = {node.name: node for node in program.graph.nodes}
    names: dict[str, str] = {}
    for name, tensor in zip(program.graph_signature.user_inputs, spec.inputs, strict=True):
        for size, dim in zip(nodes[str(name)].meta["val"].shape, tensor.shape, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(dim, str):
                names |= {str(symbol): dim.rpartition("*")[2] for symbol in size.node.expr.free_symbols}
    model = onnx.load(str(path), load_external_data=False)
    for value in (*model.graph.value_info, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), size.dim_param)
    type_codes(model)
    onnx.save(model, str(path))


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
