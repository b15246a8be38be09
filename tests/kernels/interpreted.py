"""A CUDA driver whose kernels run in the Triton language's interpreter: it is given the packed parameters of a built
binary, reads them as the machine code would, and runs the kernel's source on tensors in main memory."""

import struct
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from stepvideo_kernels.compile.binaries import Binary, descriptor_block
from stepvideo_kernels.launch.parameters import PackedParameters, TensorView

_SCALARS = {"i32": "<i", "i64": "<q", "fp32": "<f"}


class InterpretingDriver:
    """`tensors`: what the addresses stand for. `launches`: (kernel, stream) of each."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._memory = {tensor.data_ptr(): tensor for tensor in tensors}
        self.launches: list[tuple[str, int]] = []

    def load(self, binary: Binary, code: bytes) -> Any:
        assert code[:4] == b"\x7fELF"
        return getattr(import_module(f"stepvideo_kernels.{binary.op}.kernel"), binary.entry)

    def encode_tensor_map(self, view: TensorView, encoding: Mapping[str, Any]) -> bytes:
        assert next(iter(encoding["block_size"])) == 1
        return struct.pack("<Q", view.address) + bytes(120)

    def launch(
        self, kernel: Any, binary: Binary, grid: tuple[int, int, int], stream: int, parameters: PackedParameters
    ) -> None:
        raw = iter(parameters.raw(index) for index in range(len(binary.slots)))
        arguments = {name: self._argument(name, kind, raw) for name, kind in binary.parameters}
        assert list(raw) == [bytes(8), bytes(8)]  # no scratch memory
        constants = {**binary.constexprs, **({"INTERPRET": True} if "INTERPRET" in binary.constexprs else {})}
        kernel[grid](**arguments, **constants)
        self.launches.append((binary.name, stream))

    def _argument(self, name: str, kind: str, raw: Iterator[bytes]) -> Any:
        first = next(raw)
        if kind.startswith("*"):
            return self._memory[int.from_bytes(first, "little")]
        if not kind.startswith("tensordesc"):
            return struct.unpack(_SCALARS[kind], first)[0]
        from triton.tools.tensor_descriptor import TensorDescriptor

        block = descriptor_block(name, kind)
        shape = [int.from_bytes(next(raw), "little") for _ in block]
        strides = [int.from_bytes(next(raw), "little") for _ in block]
        tensor = self._memory[int.from_bytes(first[:8], "little")]
        assert torch.Size(shape).numel() == tensor.numel()
        return TensorDescriptor(tensor, shape, strides, list(block))
