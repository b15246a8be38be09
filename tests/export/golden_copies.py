"""Parts and damaged copies of a golden folder."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Edit = Callable[[dict[str, Tensor]], None]


def copy_goldens(
    source: Path, out: Path, prefixes: tuple[str, ...] = ("",), edit: Edit | None = None, **settings: object
) -> Path:
    """The entries of `source` whose names begin with one of `prefixes`, their tensors changed by `edit`, in `out`;
    `settings` are added to goldens.json. Entries that `edit` adds or removes are added and removed there too."""
    out.mkdir()
    everything = json.loads((source / "goldens.json").read_text(encoding="utf-8"))
    tensors = {k: v for k, v in load_file(source / "goldens.safetensors").items() if k.startswith(prefixes)}
    if edit is not None:
        edit(tensors)
    entries = {name: everything["entries"].get(name, {}) for name in tensors}
    (out / "goldens.json").write_text(json.dumps(everything | settings | {"entries": entries}), encoding="utf-8")
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
