"""What training keeps on disk: tensors in one safetensors file, replaced whole; the count of steps in its header."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepvideo_serve.errors import CheckpointError


def save_state(path: Path, tensors: Mapping[str, Tensor], **numbers: int | str) -> None:
    """Writes beside `path` first, so that an interruption loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        new,
        metadata={name: str(value) for name, value in numbers.items()},
    )
    new.chmod(0o644)
    new.replace(path)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the header. Raises CheckpointError when the file is unreadable."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # safetensors raises several unrelated types for a bad file
        raise CheckpointError(
            f"{path} must be a training state written by toyworld.train, could not be read ({error}): remove it."
        ) from None


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `part`."""
    return {prefix + name: tensor for name, tensor in tensors.items()}
