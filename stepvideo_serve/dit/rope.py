"""Three-dimensional rotary position embedding (RoPE).

A head's 128 channels are split 64 / 32 / 32 for frame, row and column. Inside each part the usual rotate-half rule
holds: channel i is paired with channel i + part/2 and both turn by position * theta^(-2i/part), theta 1e4.
Angles are kept in fp32 until after cos and sin: the official code rounds them to bf16 first, which moves positions
above 256 visibly, and is not reproduced.
Source: Step-Video-T2V report (arXiv 2502.10248), "3D RoPE"; RoFormer (arXiv 2104.09864).
"""

import torch
from torch import Tensor
from torch.onnx.ops import rotary_embedding

from stepvideo_serve.dit.config import ROPE_SPLIT

THETA = 1e4


def rope_tables(frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every token of a [frames, height, width] latent grid in raster order.

    Returns two fp32 tensors [frames * height * width, 128], each part's angles repeated for its two halves.
    """
    axes = [torch.arange(size, dtype=torch.float32) for size in (frames, height, width)]
    positions = torch.cartesian_prod(*axes).reshape(-1, 3)
    parts = [axis_angles(positions[:, i], channels) for i, channels in enumerate(ROPE_SPLIT)]
    angles = torch.cat(parts, dim=-1)
    return angles.cos(), angles.sin()


def axis_angles(positions: Tensor, channels: int) -> Tensor:
    """Angles [n, channels] of one axis for positions [n]; the second half repeats the first."""
    frequencies = 1.0 / THETA ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles, angles], dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [batch, tokens, heads, 128] by tables [tokens, 128]; computes in the tables' dtype, returns x's.

    One standard RotaryEmbedding per part: a single pass over its channels in ONNX Runtime and in TensorRT.
    """
    heads_first = x.transpose(1, 2).to(cos.dtype)
    parts = zip(heads_first.split(ROPE_SPLIT, dim=-1), _angle_parts(cos), _angle_parts(sin), strict=True)
    rotated = [
        rotary_embedding(part, cos_part.expand(len(x), -1, -1), sin_part.expand(len(x), -1, -1))
        for part, cos_part, sin_part in parts
    ]
    return torch.cat(rotated, dim=-1).transpose(1, 2).to(x.dtype)


def _angle_parts(table: Tensor) -> list[Tensor]:
    """[tokens, 128] -> per axis [1, tokens, channels / 2]: the halves of a part are equal, the operator takes one."""
    return [part.chunk(2, dim=-1)[0][None] for part in table.split(ROPE_SPLIT, dim=-1)]
