"""How long a calibration will take: its multiplications, at the rate that this device reaches in a matrix product."""

import time
from collections.abc import Iterable
from typing import Final

import torch

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.parallel.layout import SINGLE
from stepvideo_serve.planning.cost import step_flops
from stepvideo_serve.planning.model_size import ModelConfigs, model_size, workload
from stepvideo_serve.request import GenerationRequest
from stepvideo_serve.sampling.denoise import needs_guidance

SIDE: Final = {"cpu": 1024, "cuda": 8192}
"""Of the matrices that are multiplied, by device."""
TRIAL_S: Final = 0.3
SHARE: Final = 0.7
"""What a step reaches of the rate of a matrix product: `make bench-dit` has 0.77 on a CPU, observing takes the rest."""


def forecast_s(checkpoint: Checkpoint, requests: Iterable[GenerationRequest], precision: str, device: str) -> float:
    """Seconds for the steps of all requests, their texts and images; without loading the weights. Raises
    CheckpointError."""
    configs = ModelConfigs.load(checkpoint.folder)
    size, flops = model_size(configs), 0.0
    for request in requests:
        work = workload(configs, request.geometry, request.steps)
        branches = 1.0 if needs_guidance(request.cfg_scale) else 0.5
        step = sum(step_flops(size, SINGLE, work).values())
        flops += branches * (request.steps * step + work.prepare_flops + work.llm_flops) + work.encode_flops
    return flops / (SHARE * matmul_rate(precision, device))


def matmul_rate(precision: str, device: str) -> float:
    """FLOP/s of a matrix product in torch; takes TRIAL_S about."""
    side, dtype = SIDE[device], {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    _product(matrix)  # what happens once
    began_s, count = time.perf_counter(), 0
    while time.perf_counter() - began_s < TRIAL_S:
        _product(matrix)
        count += 1
    return count * 2.0 * side**3 / (time.perf_counter() - began_s)


def _product(matrix: torch.Tensor) -> None:
    matrix @ matrix
    if matrix.is_cuda:
        torch.cuda.synchronize()


def in_words(seconds: float) -> str:
    """With two digits: 40 s, 2.5 min, 13 h."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 100 * length else f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 1.0):.2g} s"
