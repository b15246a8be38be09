"""Weights made from their names, so that goldens of large networks need no weight files.

A tensor depends on its key in the state dict, its shape and a seed; values are exact in bf16 and kept in fp32.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
SEED_MASK = 0x7FFFFFFF


def generator_for(name: str, seed: int) -> torch.Generator:
    """A generator seeded with the name's CRC-32 and `seed`."""
    return torch.Generator().manual_seed((zlib.crc32(name.encode()) + seed) & SEED_MASK)


def normal_for(name: str, seed: int, shape: Iterable[int], scale: float = 1.0) -> Tensor:
    """fp32 standard normal values times `scale`, rounded to bf16."""
    return round_to_bf16(torch.randn(tuple(shape), generator=generator_for(name, seed)) * scale)


def round_to_bf16(tensor: Tensor) -> Tensor:
    """The nearest values that bf16 has, in fp32."""
    return tensor.bfloat16().float()


def weight_for(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The weight of that key in the state dict."""
    values = torch.randn(shape, generator=generator_for(key, seed))
    if key.endswith("scale_shift_table"):
        values *= 0.3
    elif key.endswith(("q_norm.weight", "k_norm.weight")):
        values = 1.5 + 0.2 * values
    elif len(shape) == 1:
        values = 1 + 0.2 * values if key.endswith(".weight") else 0.1 * values
    elif not key.endswith("embeddings.weight"):
        values *= _gain(key) / torch.Size(shape[1:]).numel() ** 0.5
    return round_to_bf16(values)


def _gain(key: str) -> float:
    if key.startswith("decoder.conv_out"):
        return 0.6
    if key.startswith("encoder.conv_out"):
        return 0.7
    if key.endswith("attn2.wo.weight"):
        return 3.0
    return 1.4 if "embedder" in key else 1.0


def made_by_rule(build: Callable[[], M], seed: int, prefix: str = "") -> tuple[M, dict[str, float]]:
    """The network with weights by the rule, keys hashed with `prefix` in front, and the sum of the magnitudes of
    each; evaluation mode, no gradients. Takes little more memory than the weights."""
    with torch.device("meta"):
        module = build()
    state: dict[str, Tensor] = {}
    sums: dict[str, float] = {}
    for key, meta in module.state_dict().items():
        state[key] = weight_for(prefix + key, tuple(meta.shape), seed)
        sums[prefix + key] = float(state[key].abs().sum(dtype=torch.float64))
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval(), sums
