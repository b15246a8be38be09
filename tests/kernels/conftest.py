"""Tests of the kernels run the Triton language's interpreter: no GPU is needed, and results come from the CPU."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

# The language decides when it is first imported whether its functions are interpreted.
os.environ["TRITON_INTERPRET"] = "1"
if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
    raise RuntimeError("tests/kernels needs to set TRITON_INTERPRET before triton is imported, which was too late.")

_TORCH = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@pytest.fixture(autouse=True, scope="session")
def rounding_as_on_a_gpu() -> Iterator[None]:
    """Conversions between element types round to nearest even, as the hardware does.

    The interpreter of triton 3.9 cuts bf16 off instead, and halves the values that round up to a power of two in FP8
    (127.8 becomes 64): see test_interpreter.py.
    """
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


def convert(values: np.ndarray[Any, Any], source: Any, target: Any, rounding: object) -> np.ndarray[Any, Any]:
    """Stands in for the interpreter's own: raw bits in, raw bits out. `rounding` other than to nearest is not used."""
    del rounding
    raw = torch.from_numpy(np.ascontiguousarray(values).view(f"i{values.dtype.itemsize}").copy())
    if raw.dtype == torch.int8:
        raw = raw.view(torch.uint8)
    converted = raw.view(_TORCH[source.name]).to(_TORCH[target.name])
    bits = converted.view(_BITS[converted.element_size()]).numpy()
    return bits.view(f"u{converted.element_size()}").reshape(values.shape)
