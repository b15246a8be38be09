"""A calibration for tests: the same range for every tensor."""

from pathlib import Path

from export.quantize.calibration import PARTS, Calibration
from export.quantize.fp8 import Fp8
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.fused.layers import OPERANDS, all_names


def calibrated(model: Path, keep: tuple[str, ...] = (), amax: float = 6.0) -> Fp8:
    """Wide enough for the random inputs of a comparison by default."""
    checkpoint = Checkpoint(model)
    layers = all_names(checkpoint.dit_config, checkpoint.llm_config)
    names = [name for name in layers if not name.endswith(".core")]
    names += [f"{name}.{operand}" for name in layers if name.endswith(".core") for operand in OPERANDS]
    digests = {part: checkpoint.digest(part) for part in PARTS}
    return Fp8(Calibration(digests, {"steps": 1}, dict.fromkeys(names, amax)), keep)
