"""Writes trained networks as a checkpoint in the official layout, bf16; the text encoders are copied from another."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepvideo_serve.dit.config import HEAD_DIM, DiTConfig

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
            _save(new / "vae_v2.safetensors", {_vae_file_key(key): tensor for key, tensor in vae.items()})
        else:
            (new / "config.json").write_text(json.dumps(dit_json(dit_config), indent=2) + "\n", encoding="utf-8")
            _save(new / "diffusion_pytorch_model.safetensors", dit)
        if (out / name).exists():
            shutil.rmtree(out / name)
        new.rename(out / name)


def dit_json(config: DiTConfig) -> dict[str, Any]:
    """`transformer/config.json` with the official field names."""
    return {
        "_class_name": "StepVideoModel",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": HEAD_DIM,
        "num_layers": config.num_layers,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": [config.llm_channels, config.clip_channels],
        "attention_type": "parallel",
        "use_additional_conditions": True,
    }


def _vae_file_key(key: str) -> str:
    """The official file names the decoder's last convolution without its `.conv` level."""
    return key.replace("decoder.conv_out.conv.", "decoder.conv_out.")


def _save(path: Path, state: Mapping[str, Tensor]) -> None:
    save_file(
        {key: tensor.detach().to(torch.bfloat16).contiguous() for key, tensor in state.items()},
        path,
        metadata={"format": "pt"},
    )
    path.chmod(0o644)  # safetensors makes files that only their owner can read
