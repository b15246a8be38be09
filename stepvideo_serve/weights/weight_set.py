"""A weight set: the FP8 weights of a checkpoint, made once for all layouts, as safetensors in shards.

    weights.json                  of which checkpoint and calibration, what stays in bf16, the shards and their hashes
    transformer_blocks.00.safetensors ...
    transformer.layers.00.safetensors ...
    shared.safetensors            what belongs to no layer

Of a linear layer NAME (its key without ".weight") a shard holds NAME.codes E4M3 [M, K], NAME.output_scale fp32 [M] and
NAME.input_inverse fp32 [1]; of an attention NAME.value_scale and NAME.value_inverse fp32 [1]. Written by
python -m export.quantize.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.weights.cuts import Cut, Shape
from stepvideo_serve.weights.files import open_safetensors

FILE_NAME = "weights.json"
FORMAT_VERSION = 1
REMEDY = "make the set again with python -m export.quantize"


@dataclass(frozen=True)
class Shard:
    """A file of the set; `tensors`: the names that it holds."""

    size_bytes: int
    sha256: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class WeightSet:
    """checkpoint  digest of the weights by part of the model ("dit", "llm")
    calibration  digest of the ranges that the scales come from
    keep         globs of the layers that are not quantised
    shards       by file name
    """

    folder: Path
    checkpoint: Mapping[str, str]
    calibration: str
    keep: tuple[str, ...]
    shards: Mapping[str, Shard] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, accepted: Collection[str] = ()) -> "WeightSet":
        """Raises CheckpointError for a set that is missing or of another form, for an absent or truncated shard, and
        where `accepted` names manifests by the SHA-256 of their bytes, and not this set's."""
        path = folder / FILE_NAME
        try:
            content = path.read_bytes()
            _require_accepted(path, content, accepted)
            data = json.loads(content.decode("utf-8"))
        except OSError as error:
            raise CheckpointError(f"A weight set needs {path}, {error.strerror}: {REMEDY}.") from None
        except ValueError as error:
            raise CheckpointError(f"{path} must be JSON in UTF-8, found: {error}; {REMEDY}.") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path} must have format_version {FORMAT_VERSION}, found {version!r}: {REMEDY}.")
        try:
            found = _from_json(folder, data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path} must have the form of a weight set, found {type(error).__name__}: {error}; {REMEDY}."
            ) from None
        for name, shard in found.shards.items():
            _check_size(folder / name, shard)
        return found

    def verify(self, digest_of: Callable[[Path], str]) -> None:
        """Raises CheckpointError for a shard that is not as it was made; `digest_of` gives the SHA-256 of a file."""
        for name, shard in self.shards.items():
            if (found := digest_of(self.folder / name)) != shard.sha256:
                raise CheckpointError(
                    f"{self.folder / name} must have SHA-256 {shard.sha256}, found {found}: it was damaged or "
                    f"exchanged, {REMEDY}."
                )

    def identity(self, part: str) -> str:
        """What parity reports call the weights of a part of the model."""
        return weights_identity(self.checkpoint[part], self.calibration)

    def to_json(self) -> dict[str, Any]:
        shards = {name: {**vars(shard), "tensors": list(shard.tensors)} for name, shard in self.shards.items()}
        return {
            "format_version": FORMAT_VERSION,
            "checkpoint": dict(self.checkpoint),
            "calibration": self.calibration,
            "keep_bf16": list(self.keep),
            "shards": shards,
        }

    def shape(self, name: str) -> Shape:
        """Of one tensor, whole, by the header of its shard. Raises CheckpointError where the set lacks it."""
        with self._opened(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """One tensor, or the part of it that `cut` says; all of it stays mapped, and so do whole rows. Raises
        CheckpointError where the set lacks it."""
        with self._opened(name) as file:
            if cut is None:
                whole: Tensor = file.get_tensor(name)
                return whole
            header = file.get_slice(name)
            parts: list[Tensor] = [
                header[begin:end] if cut.dim == 0 else header[:, begin:end] for begin, end in cut.ranges
            ]
        if len(parts) == 1:
            return parts[0]
        as_bytes = [part.contiguous().view(torch.uint8) if part.itemsize == 1 else part for part in parts]
        return torch.cat(as_bytes, cut.dim).view(parts[0].dtype)

    @contextmanager
    def _opened(self, name: str) -> Iterator[safe_open]:
        """The shard with this tensor."""
        shard = next((file for file, shard in self.shards.items() if name in shard.tensors), None)
        if shard is None:
            raise CheckpointError(f"The weight set in {self.folder} must hold {name}, it does not: {REMEDY}.")
        with open_safetensors(self.folder / shard) as file:
            if name not in file.keys():  # noqa: SIM118  # not a mapping
                raise CheckpointError(f"{self.folder / shard} must hold {name}, it does not: {REMEDY}.")
            yield file


def weights_identity(digest: str, calibration: str | None) -> str:
    """Of the weights of a part of the checkpoint with this digest, quantised with these ranges, or not at all."""
    return hashlib.sha256(f"{digest} {calibration}".encode()).hexdigest()[:16]


def _require_accepted(path: Path, content: bytes, accepted: Collection[str]) -> None:
    if accepted and (digest := hashlib.sha256(content).hexdigest()) not in accepted:
        raise CheckpointError(
            f"{path} must be a manifest that [model] manifests names, found one with SHA-256 {digest}: restore the "
            "file, or add its hash if the set was made anew."
        )


def _check_size(path: Path, shard: Shard) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} must be a shard of the weight set, {error.strerror}: {REMEDY}.") from None
    if size != shard.size_bytes:
        raise CheckpointError(f"{path} must have {shard.size_bytes} bytes, found {size}: {REMEDY}.")


def _from_json(folder: Path, data: Mapping[str, Any]) -> WeightSet:
    shards = {
        str(name): Shard(int(shard["size_bytes"]), str(shard["sha256"]), tuple(map(str, shard["tensors"])))
        for name, shard in data["shards"].items()
    }
    if outside := [name for name in shards if Path(name).name != name]:
        raise ValueError(f"shards must lie beside it, {outside[0]!r} does not")
    checkpoint = {str(part): str(digest) for part, digest in data["checkpoint"].items()}
    return WeightSet(folder, checkpoint, str(data["calibration"]), tuple(map(str, data["keep_bf16"])), shards)
