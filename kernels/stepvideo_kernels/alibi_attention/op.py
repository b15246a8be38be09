"""`stepvideo::alibi_attention`, as a torch operator and an ONNX node."""

import torch
from torch import Tensor

from stepvideo_kernels.alibi_attention import reference, spec


@torch.library.custom_op("stepvideo::alibi_attention", mutates_args=(), device_types="cpu")
def alibi_attention(qkv: Tensor, slopes: Tensor) -> Tensor:
    """qkv [B, L, 128 (H + 2 G)], slopes [H] fp32 -> [B, L, 128 H]; the formula is in reference.py."""
    return reference.alibi_attention(qkv, slopes)


@alibi_attention.register_fake
def _shape(qkv: Tensor, slopes: Tensor) -> Tensor:
    return _output(qkv, slopes)


def _output(qkv: Tensor, slopes: Tensor) -> Tensor:
    """An empty [B, L, 128 H]."""
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], slopes.shape[0] * spec.HEAD_DIM)
