"""Torch's names for element types and devices in terms of kernel_spec."""

import torch

from stepvideo_serve.errors import EngineError

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8"}


def type_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bf16"; raises EngineError for a type that no kernel knows."""
    if dtype not in _NAMES:
        raise EngineError(f"A kernel takes {', '.join(_NAMES.values())}, got {dtype}: cast before it.")
    return _NAMES[dtype]


def sm_of(device: torch.device) -> int:
    """The architecture of a CUDA device, e.g. 90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
