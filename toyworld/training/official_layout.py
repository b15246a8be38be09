"""Writes trained networks as a checkpoint in the official layout, bf16; the text encoders are copied from another."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepvideo_serve.assembly.checkpoint import vae_file_key
from stepvideo_serve.dit.config import DiTConfig

COPIED = ("step_llm", "hunyuan_clip", "scheduler", "model_index.json")
TRAINED = ("transformer", "vae")


def write_checkpoint(
    out: Path, text_from: Path, vae: Mapping[str, Tensor], dit: Mapping[str, Tensor], dit_config: DiTConfig
) -> None:
    """Puts the trained parts into `out`, and what else a checkpoint has where `out` lacks it. Other files of `out`
    stay. Each part appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if not (out / name).exists():
            source, target = text_from / name, out / name
            new = out / f".{name}.{os.getpid()}"
            shutil.copytree(source, new) if source.is_dir() else shutil.copyfile(source, new)
            new.rename(target)
    for name in TRAINED:
        new = out / f".{name}.{os.getpid()}"
        new.mkdir()
        if name == "vae":
            _save(new / "vae_v2.safetensors", {vae_file_key(key): tensor for key, tensor in vae.items()})
        else:
            (new / "config.json").write_text(json.dumps(dit_config.to_dict(), indent=2) + "\n", encoding="utf-8")
            _save(new / "diffusion_pytorch_model.safetensors", dit)
        if (out / name).exists():
            shutil.rmtree(out / name)
        new.rename(out / name)


def _save(path: Path, state: Mapping[str, Tensor]) -> None:
    save_file(
        {key: tensor.detach().to(torch.bfloat16).contiguous() for key, tensor in state.items()},
        path,
        metadata={"format": "pt"},
    )
    path.chmod(0o644)  # safetensors makes files that only their owner can read
