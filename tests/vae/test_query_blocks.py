"""The form of the Video-VAE's attention in exported graphs."""

import pytest
from torch.nn import functional as F

from stepvideo_serve.vae.layers import attend_by_blocks
from tests.mini import normal


@pytest.mark.parametrize("blocks", [1, 2, 6, 24])
def test_blocks_of_queries_are_causal_attention(blocks: int) -> None:
    """No worse than twice what torch's own attention loses in fp32."""
    q, k, v = (2 * normal(2, 24, 16, seed=seed) for seed in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch_error = (F.scaled_dot_product_attention(q, k, v, is_causal=True) - exact).abs().max()
    assert (attend_by_blocks(q, k, v, blocks) - exact).abs().max() <= 2 * torch_error
