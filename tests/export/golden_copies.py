"""Parts and damaged copies of a golden folder."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Edit = Callable[[dict[str, Tensor]], None]


def copy_goldens(
    source: Path,
    out: Path,
    prefixes: tuple[str, ...] = ("",),
    edit: Edit | None = None,
    rename: Callable[[str], str] = str,
    **settings: object,
) -> Path:
    """The entries of `source` whose names begin with one of `prefixes` in `out`, under the names that `rename` gives
    them, their tensors changed, added or removed by `edit`; `settings` are added to goldens.json."""
    out.mkdir()
    described = json.loads((source / "goldens.json").read_text(encoding="utf-8"))
    stored = load_file(source / "goldens.safetensors")
    entries = {rename(name): entry for name, entry in described["entries"].items() if name.startswith(prefixes)}
    tensors = {rename(name): tensor for name, tensor in stored.items() if name.startswith(prefixes)}
    if edit is not None:
        edit(tensors)
    described |= settings | {"entries": {name: entries.get(name, {}) for name in tensors}}
    (out / "goldens.json").write_text(json.dumps(described), encoding="utf-8")
    save_file(tensors, out / "goldens.safetensors")
    (out / "images").symlink_to(source / "images")
    return out


def change_largest(name: str, key: Callable[[Tensor], Tensor]) -> Edit:
    """Replaces the entry's value of largest magnitude v by key(v)."""

    def edit(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].flatten()
        index = int(flat.abs().argmax())
        flat[index] = key(flat[index])
        tensors[name] = flat.reshape(tensors[name].shape)

    return edit
