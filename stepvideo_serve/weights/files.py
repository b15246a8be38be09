"""Weight files as one table of named tensors: safetensors, single or sharded, or a PyTorch state dict of tensors only.

Nothing is read but headers until tensors are asked for, and then memory-mapped. Where a conversion makes private
copies, the mapping is dropped every so often, so that converted and mapped pages do not add up.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepvideo_serve.errors import CheckpointError

INDEX_SUFFIX = ".safetensors.index.json"
REMAP_BYTES = 64 << 20
HASH_BLOCK_BYTES = 4 << 20

Rename = Callable[[str], str | None]
"""Key in the file -> key in the module, or None for a key that is not part of the model."""


class WeightFiles(Protocol):
    """Named tensors in files. `shapes` and `file_of` use the module's key names."""

    shapes: Mapping[str, tuple[int, ...]]
    file_of: Mapping[str, Path]

    def read(self, keys: Iterable[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors in `dtype`; those stored in it stay memory-mapped."""
        ...


@dataclass
class SafetensorsFiles:
    """One or several safetensors files."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    file_of: dict[str, Path] = field(default_factory=dict)
    stored_key: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, paths: list[Path], rename: Rename) -> "SafetensorsFiles":
        """Raises CheckpointError naming the file that is absent, truncated, or repeats a key of another."""
        table = cls()
        for path in paths:
            with open_safetensors(path) as file:
                for stored in file.keys():  # noqa: SIM118  # not a mapping
                    key = rename(stored)
                    if key is None:
                        continue
                    if key in table.shapes:
                        raise CheckpointError(f"{path} repeats {key}, which {table.file_of[key]} holds: remove one.")
                    table.shapes[key] = tuple(file.get_slice(stored).get_shape())
                    table.file_of[key], table.stored_key[key] = path, stored
        return table

    def read(self, keys: Iterable[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.file_of[key], []).append(key)
        for path, members in by_file.items():
            yield from self._read_file(path, members, dtype)

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


@dataclass
class StateDictFile:
    """A `pytorch_model.bin`: a pickled state dict of which only tensors are accepted."""

    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    file_of: dict[str, Path]

    @classmethod
    def open(cls, path: Path, rename: Rename) -> "StateDictFile":
        """Raises CheckpointError when the file is truncated or holds anything but tensors."""
        try:
            stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises several unrelated types for a bad file
            raise CheckpointError(
                f"{path} must be a PyTorch state dict of tensors, could not be read: {_first_line(error)}."
            ) from None
        tensors = {new: tensor for key, tensor in stored.items() if (new := rename(key)) is not None}
        return cls(tensors, {k: tuple(t.shape) for k, t in tensors.items()}, dict.fromkeys(tensors, path))

    def read(self, keys: Iterable[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            yield key, self.tensors[key].to(dtype)


def open_weights(folder: Path, rename: Rename, single: str | None = None) -> WeightFiles:
    """The weights in `folder`: the file `single` where given, else an index with its shards, else all safetensors
    files, else `pytorch_model.bin`. Raises CheckpointError when there is none or one is unreadable."""
    if single is not None:
        return SafetensorsFiles.open([folder / single], rename)
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if indices:
        return SafetensorsFiles.open(_shards(indices[0]), rename)
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return SafetensorsFiles.open(files, rename)
    state_dict = folder / "pytorch_model.bin"
    if state_dict.is_file():
        return StateDictFile.open(state_dict, rename)
    raise CheckpointError(f"{folder} must hold safetensors files or pytorch_model.bin, found neither.")


def open_safetensors(path: Path) -> safe_open:
    """A memory-mapped safetensors file, or CheckpointError naming it."""
    if not path.is_file():
        raise CheckpointError(f"{path} must be a safetensors file, found no such file.")
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
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return [index.parent / name for name in sorted(set(weight_map.values()))]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{index} must be a safetensors index with a weight_map, could not be read: {error}."
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
