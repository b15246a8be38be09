"""A folder of golden tensors of one checkpoint.

goldens.json         entries (name -> shape, dtype, description) and the prompts, seeds and settings behind them
goldens.safetensors  the tensors
images/NAME.png      first images
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from stepvideo_serve.errors import ExportError, InvalidRequest
from stepvideo_serve.video.image import decode_image
from stepvideo_serve.weights.files import open_safetensors

_STRIDE = re.compile(r"\b(?:frames|tokens) (\d*):(\d*):(\d+)")


@dataclass(frozen=True)
class Goldens:
    """`descriptions` maps each entry's name, in the order of goldens.json, to the text that says what it is."""

    folder: Path
    settings: Mapping[str, Any]
    descriptions: Mapping[str, str]
    file: safe_open

    @classmethod
    def open(cls, folder: Path) -> "Goldens":
        """Raises ExportError or CheckpointError when a file is missing, damaged, or does not match the other."""
        settings = read_json(folder / "goldens.json")
        entries = settings.get("entries")
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ExportError(f'{folder / "goldens.json"} must have an object "entries", found none.')
        path = folder / "goldens.safetensors"
        file = open_safetensors(path)
        if lost := sorted(entries.keys() - set(file.keys())):
            raise ExportError(f"{path} must hold {lost[0]}, which is missing ({len(lost)} entries are).")
        unlisted = sorted(set(file.keys()) - entries.keys())
        names = {name: str(entry.get("desc", "")) for name, entry in entries.items()} | dict.fromkeys(unlisted, "")
        return cls(folder, settings, names, file)

    def __contains__(self, name: str) -> bool:
        return name in self.descriptions

    def tensor(self, name: str) -> Tensor:
        """Raises ExportError when an entry that another one needs is absent."""
        if name not in self:
            raise ExportError(f"{self.folder} must hold {name}, which other entries depend on, found no such entry.")
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())

    def setting(self, *path: str) -> Any:
        """A value of goldens.json outside its entries. Raises ExportError."""
        value: Any = self.settings
        for key in path:
            if not isinstance(value, dict) or key not in value:
                raise ExportError(f"{self.folder / 'goldens.json'} must have {'.'.join(path)}, which is missing.")
            value = value[key]
        return value

    def described_part(self, name: str, whole: Tensor, axis: int) -> Tensor:
        """The part of `whole` that the entry keeps: every 7th slice for "tokens 0::7" in its description."""
        if found := _STRIDE.search(self.descriptions[name]):
            start, stop, step = (int(number) if number else None for number in found.groups())
            kept = range(whole.shape[axis])[slice(start, stop, step)]
            return whole.index_select(axis, torch.tensor(kept))
        return whole

    def image(self, name: str) -> Image.Image:
        """images/NAME.png. Raises ExportError."""
        path = self.folder / "images" / f"{name}.png"
        try:
            return decode_image(path.read_bytes())
        except (OSError, InvalidRequest) as error:
            raise ExportError(f"{path} must be a first image of the goldens, could not be read: {error}") from None

    def require_size(self, name: str, axis: int, size: int, what: str) -> None:
        """Raises ExportError unless that axis of the entry has the size that the checkpoint says."""
        found = self.shape(name)[axis]
        if found != size:
            raise ExportError(
                f"{name} must have {size} {what} to fit the checkpoint, has {found}: "
                f"the goldens in {self.folder} belong to another model."
            )


def read_json(path: Path) -> dict[str, Any]:
    """Raises ExportError when the file is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} must be a JSON file that describes goldens, could not be read: {error}.") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value
