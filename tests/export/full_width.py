"""A checkpoint of the full width with few DiT blocks and one Step-LLM layer, its weights random; 2.9 GB on disk with
one block, 1.2 GB more with each other."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from export.quantize.calibration import PARTS, Calibration
from export.tiny.config import llm_json
from export.tiny_checkpoint import save_weights, write_checkpoint, write_json
from stepvideo_serve.assembly.checkpoint import Checkpoint, meta_shapes
from stepvideo_serve.dit.config import BLOCKS_PREFIX, DiTConfig
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.fused.layers import all_names
from stepvideo_serve.text.step_llm import StepLLM, StepLLMConfig
from tests.mini import MINI

DIT = DiTConfig(
    num_heads=48, num_layers=1, in_channels=64, out_channels=64, patch_size=1, llm_channels=6144, clip_channels=1024
)
LLM = StepLLMConfig(
    width=6144, num_heads=48, num_groups=8, num_layers=1, ffn_width=16896, vocab_size=512, norm_eps=1e-5
)
AMAX = 16.0


def write_full_width(folder: Path, blocks: int = 1) -> None:
    """Each of the DiT's blocks in a shard of its own, everything around them in another; the other networks are those
    of MINI."""
    write_checkpoint(folder, MINI)
    config = replace(DIT, num_layers=blocks)
    dit = meta_shapes(lambda: StepVideoDiT(config))
    shards = [
        {key: shape for key, shape in dit.items() if key.startswith(f"{BLOCKS_PREFIX}{index}.")}
        for index in range(blocks)
    ]
    shards.append({key: shape for key, shape in dit.items() if not key.startswith(BLOCKS_PREFIX)})
    transformer, stem = folder / "transformer", "diffusion_pytorch_model"
    for old in (*transformer.glob("*"), *(folder / "step_llm").glob("model*")):
        old.unlink()
    write_json(transformer / "config.json", config.to_dict())
    weight_map: dict[str, str] = {}
    for index, shapes in enumerate(shards, 1):
        name = f"{stem}-{index:05d}-of-{len(shards):05d}"
        save_weights(transformer, name, _random(shapes, index))
        weight_map |= dict.fromkeys(shapes, f"{name}.safetensors")
    write_json(transformer / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "step_llm" / "config.json", llm_json(LLM))
    save_weights(folder / "step_llm", "model", _random(meta_shapes(lambda: StepLLM(LLM))))


def write_calibration(checkpoint: Checkpoint, path: Path) -> None:
    """The same range for every tensor: for memory and time only the shapes matter."""
    names = all_names(checkpoint.dit_config, checkpoint.llm_config)
    amax = {name: AMAX for name in names if not name.endswith("core")}
    amax |= {f"{name}.{operand}": AMAX for name in names if name.endswith("core") for operand in "qkv"}
    Calibration({part: checkpoint.digest(part) for part in PARTS}, {}, amax).save(path)


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Matrices that keep the size of what passes through them, norms near 1. No two are equal: TensorRT would store
    them once."""
    state, generator = {}, torch.Generator().manual_seed(seed)
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
        if len(shape) > 1:
            values *= 1 / math.sqrt(math.prod(shape[1:]))
        state[key] = 1 + 0.1 * values if key.endswith("norm.weight") else values
    return state
