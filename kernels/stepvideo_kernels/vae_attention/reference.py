"""The formula in torch operations; also what the op does on a CPU.

Axes: B batch (chunks of frames), N tokens = frames * rows * columns in raster order, C channels, all in one head.

    out_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt(C)) v_j

A token sees itself and those before it. Source: Step-Video-T2V report (arXiv 2502.10248), section 4.1.
"""

from torch import Tensor
from torch.nn import functional as F


def vae_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k and v [B, N, C] -> [B, N, C] in their type."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
