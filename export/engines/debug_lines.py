"""Command lines of Polygraphy for one engine that cannot be built, or is wrong, and the files that they need.

    <folder>/twin.onnx      the graph with fp16 for bf16, which ONNX Runtime runs (compare/fp16_copy.py)
    <folder>/inputs.json    inputs as those that the graph was compared on, in the twin's types
    <folder>/target.py      sets the architecture, which Polygraphy's tools but `convert` have no option for

TensorRT-RTX needs no GPU to build; to load an engine either TensorRT needs one.
"""

import shlex
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.compare.fp16_copy import twin_spec, write_fp16_twin
from export.engines.expectations import PLUGIN_DOMAIN
from export.engines.toolkit import LIBRARY_PATH, RTX_SWITCH
from export.graphs.example_inputs import SMALL_SIZES, sample_inputs
from stepvideo_serve.engine.manifest import EngineTarget
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import ExportError

RTX = "tensorrt_rtx"
TARGET = """def postprocess_config(builder, network, config):
    import tensorrt_rtx as trt

    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM{sm}, 0)
"""
WEIGHT_SIZE = 0.02
Shapes = Sequence[int]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Line:
    """A command; `purpose`: the question that it answers; `gpu`: whether it loads an engine, which takes a GPU."""

    purpose: str
    command: tuple[str, ...]
    gpu: bool = False

    def __str__(self) -> str:
        return f"# {self.purpose}{' (needs the GPU)' if self.gpu else ''}\n{shlex.join(self.command)}"


@dataclass(frozen=True)
class Debugged:
    """The engine in question.

    graph   path of the ONNX file
    engine  where the engine is, or would be
    spec    with the ranges that the engine is built for
    """

    graph: Path
    engine: Path
    spec: EngineSpec
    target: EngineTarget


def prepare(debugged: Debugged, folder: Path) -> None:
    """Writes what the lines need into `folder`. Raises ExportError for a graph with plugins, which Polygraphy's command
    line cannot load."""
    from polygraphy.json import save_json

    nodes = onnx.load(str(debugged.graph), load_external_data=False).graph.node
    if plugins := [node.name for node in nodes if node.domain == PLUGIN_DOMAIN]:
        raise ExportError(
            f"Polygraphy's tools read graphs without plugins, {debugged.graph} has {len(plugins)}: "
            "export it to another folder with --ops native."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_fp16_twin(debugged.graph, folder / "twin.onnx")
    spec = twin_spec(debugged.spec)
    sizes = {name: min(max(SMALL_SIZES[name], dim.min), dim.max) for name, dim in spec.dims.items()}
    values = {name: tensor.numpy() for name, tensor in sample_inputs(spec, sizes, seed=1).items()}
    values |= _weights(folder / "twin.onnx", values)
    save_json([OrderedDict(values)], str(folder / "inputs.json"))
    (folder / "target.py").write_text(TARGET.format(sm=debugged.target.sm), encoding="utf-8")


def _weights(graph: Path, values: Mapping[str, Array]) -> dict[str, Array]:
    """Random ones for the inputs of the graph that are not in `values`: its weights, where these are inputs."""
    generator, found = np.random.default_rng(1), dict[str, Array]()
    for value in onnx.load(str(graph), load_external_data=False).graph.input:
        if value.name in values:
            continue
        type_ = value.type.tensor_type
        if type_.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            raise ExportError(
                f"Polygraphy takes inputs in types of numpy, {value.name} of {graph.parent.name} is in another: "
                "export the graph to another folder with its weights as constants."
            )
        weights = generator.standard_normal([dim.dim_value for dim in type_.shape.dim]) * WEIGHT_SIZE
        found[value.name] = weights.astype(helper.tensor_dtype_to_np_dtype(type_.elem_type))
    return found


def environment(target: EngineTarget, libraries: Path) -> dict[str, str]:
    """What the lines need in their environment."""
    if target.backend != RTX:
        return {RTX_SWITCH: "0"}
    return {RTX_SWITCH: "1", LIBRARY_PATH: str(libraries)}


def lines(debugged: Debugged, folder: Path) -> Iterator[Line]:
    """The commands, to be run in `folder` after `prepare`, from the cheapest question to the dearest."""
    graph, engine = str(debugged.graph.absolute()), str(debugged.engine.absolute())
    is_rtx = debugged.target.backend == RTX
    ranges, target = _ranges(debugged.spec), ["--trt-cpps", "target.py"] if is_rtx else []
    capability = "{}.{}".format(*divmod(debugged.target.sm, 10))
    to_engine = [*ranges, *(["--compute-capabilities", capability] if is_rtx else [])]
    fixed = ["--model-input-shapes", *_shapes(folder)]
    both = ["--load-inputs", "inputs.json"]
    yield _line("What does the graph hold?", "inspect", "model", graph, "--show", "layers")
    yield _line("Is it built?", "convert", graph, "-o", "whole.engine", *to_engine, gpu=not is_rtx)
    yield _line("What does the engine hold?", "inspect", "model", engine, "--model-type", "engine", gpu=True)
    results = ["--save-outputs", "reference.json"]
    yield _line("What does ONNX Runtime give?", "run", "twin.onnx", "--onnxrt", *both, *results)
    compared = ["--load-outputs", "reference.json", "--compare", "cosine_similarity"]
    yield _line("Is the engine off?", "run", engine, "--model-type", "engine", "--trt", *both, *compared, gpu=True)
    middle = _middle(folder / "twin.onnx")
    half = ["extract", "twin.onnx", "-o", "half.onnx", "--outputs", f"{middle}:auto"]
    yield _line("Is its first half off already?", "surgeon", *half)
    builds = ["--check", _tool(), "convert", "polygraphy_debug.onnx", "-o", "part.engine", *to_engine[len(ranges) :]]
    # From its end only: to cut the front off as well, ONNX Runtime would have to run what it has no kernels for.
    reduce = ["reduce", graph, "-o", "not-built.onnx", "--mode", "bisect", "--no-reduce-inputs", *fixed]
    yield _line("Which part of it is not built?", "debug", *reduce, *builds, gpu=not is_rtx)
    agrees = ["--check", _tool(), "run", "polygraphy_debug.onnx", "--onnxrt", "--trt", *target, *compared[-2:]]
    reduce = ["reduce", "twin.onnx", "-o", "off.onnx", "--mode", "bisect", *fixed, *both]
    yield _line("Which part of it is off?", "debug", *reduce, *agrees, gpu=True)
    repeat = ["build", graph, "--until", "3", *ranges, *target]
    same = ["--check", _tool(), "run", "polygraphy_debug.engine", "--model-type", "engine", "--trt", *both, *compared]
    yield _line("Is it off only with some tactics?", "debug", *repeat, *same, gpu=True)


def _tool() -> str:
    return str(Path(sys.executable).with_name("polygraphy"))


def _line(purpose: str, *command: str, gpu: bool = False) -> Line:
    return Line(purpose, (_tool(), *command), gpu)


def _ranges(spec: EngineSpec) -> list[str]:
    """Options for the smallest, optimal and largest shape of each input whose sizes are open."""
    open_inputs = {tensor.name: spec.bounds(tensor) for tensor in spec.inputs if tensor.symbols}
    if not open_inputs:
        return []
    given = []
    for index, option in enumerate(("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes")):
        given += [option, *(_shape(name, shapes[index]) for name, shapes in open_inputs.items())]
    return given


def _shapes(folder: Path) -> list[str]:
    """Those of the inputs in the folder."""
    from polygraphy.json import load_json

    found: Sequence[Mapping[str, Any]] = load_json(str(folder / "inputs.json"))
    return [_shape(name, values.shape) for name, values in found[0].items()]


def _shape(name: str, sizes: Shapes) -> str:
    return f"{name}:[{','.join(map(str, sizes))}]"


def _middle(graph: Path) -> str:
    """The output of the node in the middle."""
    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    return str(nodes[len(nodes) // 2].output[0])
