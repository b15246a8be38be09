"""Weight files as one table of named tensors: safetensors, single or sharded, or a PyTorch state dict of tensors only.

Nothing is read but headers until tensors are asked for, and then memory-mapped. Where a conversion makes private
copies, the mapping is dropped every so often, so that converted and mapped pages do not add up.

Of a tensor of which only a part is wanted, rows in one run stay mapped; what has to be put together from several runs
(columns, several sections) is copied block by block.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.weights.cuts import Cut, Shape
from stepvideo_serve.weights.whole_file import check_whole, is_hidden

INDEX_SUFFIX = ".safetensors.index.json"
STATE_DICT = "pytorch_model.bin"
WEIGHT_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
REMAP_BYTES = 64 << 20
CUT_BLOCK_BYTES = 8 << 20
HASH_BLOCK_BYTES = 4 << 20
NO_CUTS: Mapping[str, Cut] = MappingProxyType({})

Rename = Callable[[str], str | None]
"""Key in the file -> key in the module, or None for a key that is not part of the model."""


class WeightFiles(Protocol):
    """Named tensors in files. `shapes` and `file_of` use the module's key names."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    @property
    def file_of(self) -> Mapping[str, Path]: ...

    def read(
        self, keys: Iterable[str], dtype: torch.dtype, cuts: Mapping[str, Cut] = NO_CUTS
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors in `dtype`, in any order, of those in `cuts` only the part that is wanted; nothing else is
        read. What is stored in `dtype` and contiguous stays memory-mapped."""
        ...


@dataclass
class SafetensorsFiles:
    """One or several safetensors files."""

    shapes: dict[str, Shape] = field(default_factory=dict)
    file_of: dict[str, Path] = field(default_factory=dict)
    stored_key: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, paths: list[Path], rename: Rename) -> "SafetensorsFiles":
        """Raises CheckpointError naming the file that is absent, truncated, repeats a key, or holds other numbers
        than floating point ones of 16 bits or more (quantised weights make no sense without their scales)."""
        table = cls()
        for path in paths:
            with open_safetensors(path) as file:
                for stored in file.keys():  # noqa: SIM118  # not a mapping
                    key = rename(stored)
                    if key is None:
                        continue
                    if key in table.shapes:
                        raise CheckpointError(f"{path} repeats {key}, which {table.file_of[key]} holds: remove one.")
                    header = file.get_slice(stored)
                    _check_dtype(path, key, header.get_dtype(), WEIGHT_DTYPES.keys())
                    table.shapes[key] = tuple(header.get_shape())
                    table.file_of[key], table.stored_key[key] = path, stored
        return table

    def read(
        self, keys: Iterable[str], dtype: torch.dtype, cuts: Mapping[str, Cut] = NO_CUTS
    ) -> Iterator[tuple[str, Tensor]]:
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.file_of[key], []).append(key)
        for path, members in by_file.items():
            yield from self._read_file(path, [key for key in members if key not in cuts], dtype)
            for key in members:
                if key in cuts:
                    yield key, self._read_cut(path, key, dtype, cuts[key])

    def _read_file(self, path: Path, keys: list[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        pending = list(reversed(keys))
        while pending:
            converted = 0
            with open_safetensors(path) as file:
                while pending and converted < REMAP_BYTES:
                    key = pending.pop()
                    stored = file.get_tensor(self.stored_key[key])
                    if stored.dtype != dtype:
                        converted += stored.nbytes
                    yield key, stored.to(dtype)

    def _read_cut(self, path: Path, key: str, dtype: torch.dtype, cut: Cut) -> Tensor:
        name, whole = self.stored_key[key], self.shapes[key]
        with open_safetensors(path) as file:
            header = file.get_slice(name)
            stored = WEIGHT_DTYPES[header.get_dtype()]
            if cut.is_contiguous and stored == dtype:
                begin, end = cut.ranges[0]
                rows: Tensor = header[begin:end]
                return rows
        row_bytes = prod(whole[1:]) * stored.itemsize
        part = torch.empty(cut.shape(whole), dtype=dtype)
        for source, target in cut.blocks(whole, rows=max(1, CUT_BLOCK_BYTES // row_bytes)):
            with open_safetensors(path) as file:  # anew, so that the pages of the last block are no longer mapped
                part[target] = file.get_slice(name)[source]
        return part


@dataclass
class StateDictFile:
    """A `pytorch_model.bin`: a pickled state dict of which only tensors are accepted."""

    tensors: dict[str, Tensor]
    shapes: dict[str, Shape]
    file_of: dict[str, Path]

    @classmethod
    def open(cls, path: Path, rename: Rename) -> "StateDictFile":
        """Raises CheckpointError when the file is truncated or holds anything but tensors."""
        check_whole(path)
        try:
            stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises several unrelated types for a bad file
            raise CheckpointError(
                f"{path} must be a PyTorch state dict of tensors, could not be read: {_first_line(error)}."
            ) from None
        if not isinstance(stored, dict):
            raise CheckpointError(f"{path} must be a dict of tensors by name, holds a {type(stored).__name__}.")
        tensors: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            key = rename(str(name))
            if key is None:
                continue
            if not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{path} must hold tensors only, holds a {type(tensor).__name__} under {name}: "
                    "save the model's state_dict alone."
                )
            if key in tensors:
                raise CheckpointError(f"{path} holds {key} twice, with and without a prefix: remove one.")
            _check_dtype(path, key, tensor.dtype, WEIGHT_DTYPES.values())
            tensors[key] = tensor
        return cls(tensors, {k: tuple(t.shape) for k, t in tensors.items()}, dict.fromkeys(tensors, path))

    def read(
        self, keys: Iterable[str], dtype: torch.dtype, cuts: Mapping[str, Cut] = NO_CUTS
    ) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            tensor = self.tensors[key]
            if key in cuts:
                dim, ranges = cuts[key].dim, cuts[key].ranges
                tensor = torch.cat([tensor.narrow(dim, begin, end - begin) for begin, end in ranges], dim)
            yield key, tensor.to(dtype)


def open_weights(folder: Path, rename: Rename, single: str | None = None) -> WeightFiles:
    """The weights in `folder`: the file `single` where given, else an index with its shards, else all safetensors
    files, else `pytorch_model.bin`. Raises CheckpointError when there is none or one is unreadable."""
    if single is not None:
        return SafetensorsFiles.open([folder / single], rename)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} must be a folder of weights, found no such folder.")
    indices = _visible(folder, f"*{INDEX_SUFFIX}")
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise CheckpointError(f"{folder} must hold one index of shards, found {names}: remove those of other variants.")
    if indices:
        return SafetensorsFiles.open(_shards(indices[0]), rename)
    files = _visible(folder, "*.safetensors")
    if files:
        return SafetensorsFiles.open(files, rename)
    state_dict = folder / STATE_DICT
    if state_dict.is_file():
        return StateDictFile.open(state_dict, rename)
    raise CheckpointError(f"{folder} must hold safetensors files or {STATE_DICT}, found neither.")


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path))


def open_safetensors(path: Path) -> safe_open:
    """A memory-mapped safetensors file, or CheckpointError naming it."""
    if not path.is_file():
        raise CheckpointError(f"{path} must be a safetensors file, found no such file.")
    check_whole(path)
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} must be a whole safetensors file, could not be read ({error}): download it again."
        ) from None


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all in its own folder."""
    check_whole(index)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} must be a safetensors index with a weight_map, could not be read: {error}."
        ) from None
    for name in names:
        if not (index.parent / name).is_file() or Path(name).name != name:
            raise CheckpointError(f"{index} names {name}, which must be beside it and is not: download it.")
    if not names:
        raise CheckpointError(f"{index} must name the files of the weights, its weight_map is empty.")
    return [index.parent / name for name in names]


def _check_dtype(path: Path, key: str, dtype: object, allowed: Collection[object]) -> None:
    if dtype not in allowed:
        raise CheckpointError(f"{path} must hold {key} in floating point of 16 to 64 bits, found {dtype}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
