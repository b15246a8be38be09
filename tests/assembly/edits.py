"""Copies of a checkpoint with one thing changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


def linked_copy(source: Path, target: Path) -> Path:
    """A copy that shares the files; replace a file in it, never write into one."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def rewrite(path: Path, change: Callable[[State], object]) -> None:
    """Applies `change` to the tensors of a safetensors file."""
    state = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(state)
    path.unlink()
    save_file(state, path)


def replace_text(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    replace_text(path, json.dumps(values))


def truncate(path: Path) -> None:
    """Keeps the first nine tenths."""
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) * 9 // 10])


def clip_as_state_dict(folder: Path, prefix: str = "", extra: dict[str, Any] | None = None) -> None:
    """Puts pytorch_model.bin, with `prefix` before its keys and `extra` in it, in the place of model.safetensors."""
    path = folder / "hunyuan_clip" / "clip_text_encoder" / "model.safetensors"
    state: dict[str, Any] = {prefix + key: tensor for key, tensor in load_file(path).items()}
    path.unlink()
    torch.save({**state, **(extra or {})}, path.with_name("pytorch_model.bin"))
