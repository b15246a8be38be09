"""Makes the FP8 weight set of a checkpoint, shard by shard, with one tensor in memory at a time."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from export.quantize.calibration import Calibration, write_json
from export.quantize.fp8 import Fp8, require_gains
from export.quantize.shards import Layout, write_shard
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.dit.config import BLOCKS_PREFIX
from stepvideo_serve.engine.manifest import content_key
from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.fused.fp8 import FP8, power_rows, power_scale
from stepvideo_serve.fused.layers import DIT_LINEARS, LLM_LINEARS, SHARED_CORE, check_globs, is_kept
from stepvideo_serve.text.step_llm import LAYERS_PREFIX
from stepvideo_serve.weights.weight_set import FILE_NAME, WeightSet

SHARED = "shared.safetensors"
PARTS = ("dit", "llm")


def make_weight_set(checkpoint: Checkpoint, fp8: Fp8, out: Path, show_progress: bool = True) -> WeightSet:
    """Brings the set in `out` up to date: shards of the same checkpoint, calibration and layers stay.

    Raises ExportError when calibration, globs or norm gains do not fit, CheckpointError for the weights.
    """
    fp8.calibration.require(checkpoint)
    check_globs(fp8.keep, checkpoint.dit_config, checkpoint.llm_config)
    made = _opened(checkpoint, fp8, out)
    shards = _shards(checkpoint, fp8)
    out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in shards if name not in made.shards]
    for name in tqdm(missing, desc="quantize", unit="shard", disable=not show_progress, file=sys.stderr):
        part, layers = shards[name]
        shard = write_shard(out / name, _layout(checkpoint, part, layers), _tensors(checkpoint, fp8, part, layers))
        made = replace(made, shards={**made.shards, name: shard})
        write_json(out / FILE_NAME, made.to_json())
    made = replace(made, shards={name: made.shards[name] for name in shards})
    write_json(out / FILE_NAME, made.to_json())
    return made


def calibration_digest(calibration: Calibration) -> str:
    """Of the ranges, whatever else the file says."""
    return content_key(amax=dict(calibration.amax))


def _opened(checkpoint: Checkpoint, fp8: Fp8, out: Path) -> WeightSet:
    """What is there already of just this set, or an empty one."""
    digests = {part: checkpoint.digest(part) for part in PARTS}
    fresh = WeightSet(out, digests, calibration_digest(fp8.calibration), tuple(sorted(fp8.keep)))
    try:
        found = WeightSet.load(out)
    except CheckpointError:
        return fresh
    return found if replace(found, shards={}) == fresh else fresh


def _shards(checkpoint: Checkpoint, fp8: Fp8) -> dict[str, tuple[str, list[str]]]:
    """File name -> part of the model, and its layers that are quantised."""
    tables = (
        ("dit", BLOCKS_PREFIX, checkpoint.dit_config.num_layers, (*DIT_LINEARS, "attn1.core")),
        ("llm", LAYERS_PREFIX, checkpoint.llm_config.num_layers, LLM_LINEARS),
    )
    shards = {}
    for part, prefix, count, names in tables:
        for index in range(count):
            layers = [f"{prefix}{index}.{name}" for name in names]
            shards[f"{prefix}{index:02d}.safetensors"] = (part, [one for one in layers if not is_kept(one, fp8.keep)])
    shards[SHARED] = ("dit", [] if is_kept(SHARED_CORE, fp8.keep) else [SHARED_CORE])
    return shards


def _layout(checkpoint: Checkpoint, part: str, layers: list[str]) -> Layout:
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in layers:
        if name.endswith(".core"):
            found |= dict.fromkeys((f"{name}.value_scale", f"{name}.value_inverse"), (torch.float32, (1,)))
            continue
        shape = checkpoint.shape(part, f"{name}.weight")
        found[f"{name}.codes"] = (FP8, shape)
        found[f"{name}.output_scale"] = (torch.float32, shape[:1])
        found[f"{name}.input_inverse"] = (torch.float32, (1,))
    return found


def _tensors(checkpoint: Checkpoint, fp8: Fp8, part: str, layers: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in layers:
        if name.endswith(".core"):
            yield from _values(checkpoint, fp8.calibration, name)
        else:
            yield from _linear(checkpoint, fp8.calibration, part, name)


def _linear(checkpoint: Checkpoint, calibration: Calibration, part: str, name: str) -> Iterator[tuple[str, Tensor]]:
    input_scale = power_scale(torch.tensor([calibration.of(name)]))
    key = f"{name}.weight"
    codes, scale = power_rows(checkpoint.tensors(part, [key], torch.bfloat16)[key])
    yield f"{name}.codes", codes
    yield f"{name}.output_scale", scale * input_scale
    yield f"{name}.input_inverse", 1 / input_scale


def _values(checkpoint: Checkpoint, calibration: Calibration, name: str) -> Iterator[tuple[str, Tensor]]:
    if name != SHARED_CORE:
        require_gains(name, _gains(checkpoint, name))
    of = calibration.largest if name == SHARED_CORE else calibration.of
    scale = power_scale(torch.tensor([of(f"{name}.v")]))
    yield f"{name}.value_scale", scale
    yield f"{name}.value_inverse", 1 / scale


def _gains(checkpoint: Checkpoint, core: str) -> Mapping[str, Tensor]:
    attention = core.removesuffix(".core")
    keys = [f"{attention}.{norm}.weight" for norm in ("q_norm", "k_norm")]
    return checkpoint.tensors("dit", keys, torch.float32)
