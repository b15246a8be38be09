"""`stepvideo::vae_attention`, as a torch operator and an ONNX node."""

import torch
from torch import Tensor

from stepvideo_kernels.vae_attention import reference


@torch.library.custom_op("stepvideo::vae_attention", mutates_args=(), device_types="cpu")
def vae_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k and v [B, N, C], C a multiple of 32 -> [B, N, C]; the formula is in reference.py."""
    return reference.vae_attention(q, k, v)


@vae_attention.register_fake
def _shape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    del k, v
    return torch.empty_like(q)
