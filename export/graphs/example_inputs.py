"""Inputs for exporting and comparing graphs: random, reproducible, and in the range that each graph meets in use."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stepvideo_serve.engine.spec import EngineSpec, TensorSpec

SMALL_SIZES = {"tokens": 90, "llm_tokens": 23, "context_tokens": 100, "latent_height": 3, "latent_width": 5}
LARGE_SIZES = {"tokens": 231, "llm_tokens": 61, "context_tokens": 138, "latent_height": 6, "latent_width": 4}
TOKEN_IDS = 100


def sample_inputs(spec: EngineSpec, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """One tensor per input of `spec`, with a size from `sizes` for each of its symbols."""
    generator = torch.Generator().manual_seed(seed)
    return {tensor.name: _sample(tensor, sizes, generator) for tensor in spec.inputs}


def _sample(tensor: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = tensor.resolve(sizes)
    if tensor.name == "attention_mask":
        return (torch.arange(shape[-1]) < shape[-1] // 2).to(tensor.torch_dtype).expand(shape).contiguous()
    if tensor.dtype in ("int64", "int32"):
        return torch.randint(TOKEN_IDS, shape, generator=generator, dtype=tensor.torch_dtype)
    values = torch.randn(shape, generator=generator)
    if tensor.name == "timestep":
        values = torch.rand(shape, generator=generator)
    elif tensor.name in ("rope_cos", "rope_sin"):
        values = values.cos() if tensor.name == "rope_cos" else values.sin()
    elif tensor.name == "pixels":
        values = values.tanh()
    return values.to(tensor.torch_dtype)
