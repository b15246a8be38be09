"""How the DiT is cut for tensor parallelism: by heads and by hidden channels of the feed-forward.

What leads into heads or hidden channels is cut by rows; what leads out of them (`wo`, `ff.net.2`) is cut by columns and
gives partial sums. Everything around the blocks is small and stays whole.
Source: Megatron-LM (arXiv 1909.08053), section 3.
"""

from stepvideo_serve.dit.config import FFN_MULTIPLE, DiTConfig
from stepvideo_serve.weights.cuts import REPLICATED, ShardPlan, Split


def dit_plan(config: DiTConfig) -> ShardPlan:
    """Covers every key of the checkpoint. In wqkv and wkv the q, k and v of a head are neighbours."""
    heads, hidden = config.num_heads, FFN_MULTIPLE * config.width
    block = "transformer_blocks.*."
    return ShardPlan(
        "the DiT",
        {
            f"{block}attn1.wqkv.weight": Split(0, heads),
            f"{block}attn1.wo.weight": Split(1, heads),
            f"{block}attn2.wq.weight": Split(0, heads),
            f"{block}attn2.wkv.weight": Split(0, heads),
            f"{block}attn2.wo.weight": Split(1, heads),
            f"{block}ff.net.0.proj.weight": Split(0, hidden),
            f"{block}ff.net.2.weight": Split(1, hidden),
            f"{block}attn[12].[qk]_norm.weight": REPLICATED,
            f"{block}norm[12].*": REPLICATED,
            f"{block}scale_shift_table": REPLICATED,
            "pos_embed.proj.*": REPLICATED,
            "adaln_single.*": REPLICATED,
            "caption_projection.*": REPLICATED,
            "clip_projection.*": REPLICATED,
            "scale_shift_table": REPLICATED,
            "proj_out.*": REPLICATED,
        },
    )
