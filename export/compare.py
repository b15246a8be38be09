"""Does an ONNX graph compute what its torch module computes?

Errors are relative to the largest magnitude of the reference. fp32: the graph against the module, at most 2e-5 (two
equivalent runs of the official code differ by up to 4e-6). fp16: both against the module in fp32; the graph may lose
twice what torch itself loses in fp16. bf16: ONNX Runtime has no bf16 kernels on a CPU, so nothing is run.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.samples import LARGE_SIZES, SMALL_SIZES, sample_inputs
from stepvideo_serve.engine.eager import EagerRunner
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.errors import ExportError

FP32_ALLOWED = 2e-5


def compare_with_eager(spec: EngineSpec, module: nn.Module, path: Path, precision: str) -> list[dict[str, Any]]:
    """One row per output and shape: output, sizes, error, allowed. Raises ExportError when an error is too large."""
    if precision == "bf16":
        return []
    rows = []
    with OrtRunner(spec, path) as graph, EagerRunner(spec, module) as eager:
        for sizes in (SMALL_SIZES, LARGE_SIZES):
            used = {name: size for name, size in sizes.items() if name in spec.dims}
            inputs = sample_inputs(spec, used, seed=1)
            outputs, ours = graph(**inputs), eager(**inputs)
            reference = ours if precision == "fp32" else _in_fp32(module, inputs, ours)
            for name, value in outputs.items():
                allowed = FP32_ALLOWED if precision == "fp32" else 2 * relative_error(ours[name], reference[name])
                error = relative_error(value, reference[name])
                if not error <= allowed:
                    raise ExportError(
                        f"{spec.name}: output {name} at {used} must be within {allowed:.1e} of the reference, "
                        f"is off by {error:.1e}."
                    )
                rows.append({"output": name, "sizes": used, "error": error, "allowed": allowed})
    return rows


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max |value - reference| / max |reference|, in fp64."""
    difference = (value.double() - reference.double()).abs().max()
    return float(difference / reference.double().abs().max().clamp_min(1e-30))


def _in_fp32(module: nn.Module, inputs: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    wide = copy.deepcopy(module).float()
    with torch.inference_mode():
        returned = wide(*(x.float() if x.is_floating_point() else x for x in inputs.values()))
    values = (returned,) if isinstance(returned, Tensor) else returned
    return dict(zip(like, values, strict=True))
