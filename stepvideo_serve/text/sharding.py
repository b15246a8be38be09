"""How Step-LLM is cut for tensor parallelism: by key/value groups with their queries, and by feed-forward channels.

Embeddings and norms stay whole. Source: Megatron-LM (arXiv 1909.08053), section 3.
"""

from stepvideo_serve.text.step_llm import StepLLMConfig
from stepvideo_serve.weights.cuts import REPLICATED, ShardPlan, Split


def llm_plan(config: StepLLMConfig) -> ShardPlan:
    """Covers every key of the checkpoint. wqkv holds all queries, then each group's key and value; w1 gate, then up."""
    groups, hidden = config.num_groups, config.ffn_width
    layer = "transformer.layers.*."
    return ShardPlan(
        "Step-LLM",
        {
            f"{layer}attention.wqkv.weight": Split(0, groups, (config.width, 2 * config.head_dim * groups)),
            f"{layer}attention.wo.weight": Split(1, groups),
            f"{layer}feed_forward.w1.weight": Split(0, hidden, (hidden, hidden)),
            f"{layer}feed_forward.w2.weight": Split(1, hidden),
            f"{layer}attention_norm.weight": REPLICATED,
            f"{layer}ffn_norm.weight": REPLICATED,
            "tok_embeddings.word_embeddings.weight": REPLICATED,
        },
    )
