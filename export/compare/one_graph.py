"""Does an ONNX graph compute what its torch module computes?

The reference is the plain module in fp32, on the same inputs. Errors are relative to the largest magnitude of the
reference.

fp32        the graph may be off by 2e-5 (two equivalent runs of the official code differ by up to 4e-6)
fp16        twice what torch itself loses in fp16, its convolutions accumulating in fp32 as they do on GPUs
bf16, fp8   as fp16, with its fp16 twin (fp16_copy.py), since ONNX Runtime has no bf16 kernels on a CPU; for fp8
            torch loses what the same quantised layers lose in fp16

A graph that TensorRT compiles runs as its twin in fp16 too: scores and sums of its attention are in fp32, as on GPUs.
One for ONNX Runtime runs as it is, since that is what serves it.

A graph with plugins or NVFP4 runs nowhere but in TensorRT: its torch module, whose operators compute their formulas on
a CPU, is compared in its place, in the precision of the graph.
"""

import gc
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from export.compare.fp16_copy import in_fp16, twin_spec, write_fp16_twin
from export.compare.runners import MEASURE, REFERENCE, Contestant, compare_runners
from export.graphs.example_inputs import LARGE_SIZES, SMALL_SIZES, sample_inputs
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.runner import EagerRunner, EngineRunner
from stepvideo_serve.engine.spec import CODES, EngineSpec, TensorSpec
from stepvideo_serve.errors import ExportError

FP32_ALLOWED = 2e-5
ROUND_OFF = 2.0**-11
"""Of fp16. The least that is allowed: where torch happens to lose nothing, twice nothing would forbid rounding."""

Load = Callable[[], nn.Module]
Outputs = list[dict[str, Tensor]]


def compare_with_eager(
    spec: EngineSpec,
    path: Path,
    reference: Load,
    same_precision: Load | None = None,
    compiled: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """One row per output and shape, see `error_row`; the graph at `path` runs in ONNX Runtime, `compiled`: for
    TensorRT, as its twin.

    `reference` loads the plain module in fp32; `same_precision` the one whose loss is the measure, in fp16, quantised
    if the graph is: None for an fp32 graph. One module is in memory at a time. `weights`: those that are inputs of the
    graph; with FP8 ones the twin is in fp32, whose range products without scales need.
    Raises ExportError when an error is too large.
    """
    inputs = _inputs(twin_spec(spec))
    wide = _run_all(EagerRunner(_in_fp32(spec), reference()), [_as_fp32(values) for values in inputs])
    low = None
    if same_precision is not None:
        with RoundedConvolutions():
            low = _run_all(EagerRunner(twin_spec(spec), same_precision()), inputs)
    if same_precision is None or (spec == twin_spec(spec) and not compiled):
        found = _run_all(OrtRunner(spec, path, weights=weights), inputs)
        return _require(spec, _rows(spec, found, wide, low, "onnxruntime"))
    with tempfile.TemporaryDirectory(prefix=".twin-", dir=path.parent) as folder:
        twin, kind = Path(folder, path.name), _twin_dtype(spec)
        write_fp16_twin(path, twin, kind)
        runner = OrtRunner(twin_spec(spec, kind), twin, weights=weights_in(twin_spec(spec, kind), weights))
        found = _run_all(runner, [_as_fp32(values) if kind == "float32" else values for values in inputs])
        return _require(spec, _rows(spec, found, wide, low, "onnxruntime"))


def _twin_dtype(spec: EngineSpec) -> str:
    return "float32" if any(weight.form == CODES for weight in spec.weights) else "float16"


def weights_in(spec: EngineSpec, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The weights as the twin with the signature `spec` takes them."""
    given = {weight.name: (weight.tensor, (weights or {})[weight.name]) for weight in spec.weights}
    return {
        name: in_fp16(value.float()) if tensor.dtype == "float16" else value.to(tensor.torch_dtype)
        for name, (tensor, value) in given.items()
    }


class RoundedConvolutions(TorchFunctionMode):
    """fp16 convolutions in fp32, rounded at the end. A CPU's own take a hundred times as long."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func in (torch.conv2d, torch.conv3d) and args[0].dtype is torch.float16:
            wide = [value.float() if isinstance(value, Tensor) else value for value in args]
            return func(*wide, **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))


def compare_plugins(spec: EngineSpec, fused: nn.Module, reference: Load, same_precision: Load) -> list[dict[str, Any]]:
    """The same for the module of a graph with plugins or NVFP4; `same_precision` loads the module without plugins."""
    inputs = _inputs(spec)
    wide = _run_all(EagerRunner(_in_fp32(spec), reference()), [_as_fp32(values) for values in inputs])
    low = _run_all(EagerRunner(spec, same_precision()), inputs)
    return _require(spec, _rows(spec, _run_all(EagerRunner(spec, fused), inputs), wide, low, "torch"))


def compare_engine(
    runner: EngineRunner, reference: Load, same_precision: Load, graph: Path | None = None, save: Path | None = None
) -> list[dict[str, Any]]:
    """Rows as those of its graph, of what `runner` itself gives, with "engine" as their backend. `reference` loads the
    plain module in fp32, `same_precision` the one whose loss is the measure, in the dtypes of the engine, quantised if
    the engine is. Rows that fail are returned, too. Raises EngineError when the engine does not run.

    graph  the engine's graph as ONNX Runtime runs it, to join the comparison
    save   where its outcome is kept, see runners.py
    """
    spec, inputs = runner.spec, _inputs(runner.spec)
    contestants = [
        Contestant(REFERENCE, lambda: EagerRunner(_in_fp32(spec), reference()), list(map(_as_fp32, inputs))),
        Contestant(MEASURE, lambda: EagerRunner(spec, same_precision()), inputs, RoundedConvolutions),
        Contestant("engine", lambda: runner, inputs),
    ]
    if graph is not None:
        twin = twin_spec(spec)
        contestants.append(Contestant("onnxruntime", lambda: OrtRunner(twin, graph), _inputs(twin)))
    found = compare_runners(contestants, ROUND_OFF, save)
    wide, low, engine = (_tensors(found[name]) for name in (REFERENCE, MEASURE, "engine"))
    return [_in_json(row) for row in _rows(spec, engine, wide, low, "engine")]


def _tensors(results: Any) -> Outputs:
    """Outputs of a runner as Polygraphy has them."""
    return [{name: torch.from_numpy(array) for name, array in result.items()} for result in results]


def _in_json(row: dict[str, Any]) -> dict[str, Any]:
    """A row with NaN or infinities, which JSON lacks, as one with the largest error that there is."""
    finite = all(math.isfinite(row[name]) for name in ("error", "rms", "cosine"))
    return row if finite else {**row, "error": sys.float_info.max, "rms": sys.float_info.max, "cosine": 0.0}


def passes(row: Mapping[str, Any]) -> bool:
    """Whether a row is within its limit, and finite."""
    return bool(row["error"] <= row["allowed"]) and math.isfinite(row["rms"])


def error_row(value: Tensor, reference: Tensor) -> dict[str, float]:
    """error: largest, rms: root mean square, both over the largest magnitude of the reference; cosine."""
    found, expected = value.double(), reference.double()
    largest = float(expected.abs().max().clamp_min(1e-30))
    difference = found - expected
    norms = float(found.norm() * expected.norm())
    return {
        "error": float(difference.abs().max()) / largest,
        "rms": float(difference.square().mean().sqrt()) / largest,
        "cosine": float((found * expected).sum()) / norms if norms else 1.0,
    }


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max |value - reference| / max |reference|, in fp64."""
    return error_row(value, reference)["error"]


def _require(spec: EngineSpec, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows. Raises ExportError for one that fails."""
    for row in rows:
        if not passes(row):
            raise ExportError(
                f"{spec.name}: output {row['output']} at {row['sizes']} must be within {row['allowed']:.1e} of the "
                f"reference, is off by {row['error']:.1e}."
            )
    return rows


def _rows(
    spec: EngineSpec, outputs: Outputs, reference: Outputs, low: Outputs | None, backend: str
) -> list[dict[str, Any]]:
    rows = []
    for index, (sizes, found) in enumerate(zip(_sizes(spec), outputs, strict=True)):
        for name, value in found.items():
            row = error_row(value, reference[index][name])
            allowed = FP32_ALLOWED
            if low is not None:
                allowed = 2 * max(relative_error(low[index][name], reference[index][name]), ROUND_OFF)
            rows.append({"output": name, "sizes": sizes, **row, "allowed": allowed, "backend": backend})
    return rows


def _run_all(runner: EngineRunner, inputs: list[dict[str, Tensor]]) -> Outputs:
    try:
        with runner:
            return [runner(**values) for values in inputs]
    finally:
        gc.collect()


def _sizes(spec: EngineSpec) -> list[dict[str, int]]:
    """Two sizes per symbol, or the nearest to them that the spec takes."""
    return [
        {name: min(max(sizes[name], dim.min), dim.max) for name, dim in spec.dims.items()}
        for sizes in (SMALL_SIZES, LARGE_SIZES)
    ]


def _inputs(spec: EngineSpec) -> list[dict[str, Tensor]]:
    return [sample_inputs(spec, sizes, seed=1) for sizes in _sizes(spec)]


def _as_fp32(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() if x.is_floating_point() else x for name, x in values.items()}


def _in_fp32(spec: EngineSpec) -> EngineSpec:
    def wide(tensor: TensorSpec) -> TensorSpec:
        return TensorSpec(tensor.name, "float32", tensor.shape) if tensor.torch_dtype.is_floating_point else tensor

    return EngineSpec(spec.name, tuple(map(wide, spec.inputs)), tuple(map(wide, spec.outputs)), spec.dims)
