"""The CUDA driver under the plugins' kernels: it reads the packed parameters of a launch as machine code would, and
computes the operator's formula on the memory that they point at."""

import struct
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from stepvideo_kernels.compile.binaries import Binary
from stepvideo_kernels.launch.parameters import PackedParameters, TensorView
from stepvideo_kernels.vae_attention.reference import vae_attention
from tests.fakes.gpu import FakeGpu
from tests.fakes.graph import at_address


class FakeDriver:
    """In the place of CudaDriver. `launches`: names of the kernels that ran."""

    gpu: ClassVar[FakeGpu]
    launches: ClassVar[list[str]] = []

    def current_sm(self) -> int:
        return 90

    def load(self, binary: Binary, code: bytes) -> Any:
        del code
        return {"vae_attention": self._vae_attention}[binary.op]

    def encode_tensor_map(self, view: TensorView, encoding: Mapping[str, Any]) -> bytes:
        raise NotImplementedError("the kernels here take pointers")

    def launch(
        self, kernel: Any, binary: Binary, grid: tuple[int, int, int], stream: int, parameters: PackedParameters
    ) -> None:
        raw = {name: parameters.raw(index) for index, (name, _) in enumerate(binary.parameters)}
        kernel(binary, grid, stream, raw)
        self.launches.append(binary.name)

    def _vae_attention(self, binary: Binary, grid: tuple[int, int, int], stream: int, raw: dict[str, bytes]) -> None:
        (tokens,) = struct.unpack("<i", raw["tokens"])
        shape = (grid[2], tokens, int(binary.constexprs["WIDTH"]))
        size = 2 * grid[2] * tokens * shape[2]
        addresses = {name: int.from_bytes(raw[name], "little") for name in ("q", "k", "v", "out")}
        ranges = {name: (address, size) for name, address in addresses.items()}
        inputs, output = [ranges[name] for name in "qkv"], [ranges["out"]]
        self.gpu.launch(self.gpu.streams[stream], binary.name, inputs, output)
        q, k, v, out = (at_address(addresses[name], shape, "float16") for name in addresses)
        out.copy_(vae_attention(q.float(), k.float(), v.float()).to(torch.float16))
