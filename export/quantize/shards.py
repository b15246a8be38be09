"""Safetensors written one tensor after the other: the library's own writer wants all of a file in memory."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepvideo_serve.errors import ExportError
from stepvideo_serve.weights.weight_set import Shard

TYPES: Mapping[torch.dtype, str] = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape of what a shard will hold, in the order in which it comes."""


def write_shard(path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> Shard:
    """Writes the file in one step. Raises ExportError where `tensors` are not those of the layout."""
    temporary, digest = path.with_name(f".{path.name}.partial"), hashlib.sha256()
    try:
        with temporary.open("wb") as file:

            def put(content: Any) -> None:
                file.write(content)
                digest.update(content)

            put(_header(layout))
            left = dict(layout)
            for name, tensor in tensors:
                if left.pop(next(iter(left), ""), None) != (tensor.dtype, tuple(tensor.shape)):
                    raise ExportError(f"{path} must get {layout.get(name)} for {name}, got {tensor.dtype}.")
                put(tensor.contiguous().view(torch.uint8).numpy().data)
            if left:
                raise ExportError(f"{path} must get {min(left)}, it did not.")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Shard(path.stat().st_size, digest.hexdigest(), tuple(layout))


def _header(layout: Layout) -> bytes:
    """Its length in eight bytes, then JSON filled up with blanks to a multiple of eight."""
    described, at = {}, 0
    for name, (dtype, shape) in layout.items():
        end = at + prod(shape) * dtype.itemsize
        described[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
