"""Step-LLM cut where tensor-parallel ranks must add up, what each piece takes and gives, and the pieces put together.

    embed, then per layer   attn ─Σ─ ff ─Σ─        Σ = sum over the ranks' partial results

Each rank holds a slice of the key/value groups with their heads, and of the feed-forward's hidden channels; token
embeddings and norms are whole on all. Source: Megatron-LM (arXiv 1909.08053), section 3.
Axes: L tokens, D width, H heads of this rank.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from stepvideo_serve.communicator import Communicator
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.sharding import WHOLE, TensorPart
from stepvideo_serve.text.states import LLM_MAX_TOKENS
from stepvideo_serve.text.step_llm import (
    Attention,
    FeedForward,
    RMSNorm,
    StepLLMConfig,
    TokenEmbeddings,
    alibi_slopes,
    sqrt_alibi_bias,
)

Graph = Callable[..., dict[str, Tensor]]
LLM_TOKENS = Dim(min=2, opt=128, max=LLM_MAX_TOKENS)


class LlmEmbed(nn.Module):
    """Token ids -> embeddings, and the attention bias of this rank's heads, which all layers share."""

    def __init__(self, config: StepLLMConfig, part: TensorPart = WHOLE) -> None:
        super().__init__()
        self.tok_embeddings = TokenEmbeddings(config.vocab_size, config.width)
        begin, end = part.of(config.num_heads)
        self.slopes = alibi_slopes(config.num_heads)[begin:end]

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids [1, L] int64 -> tokens [1, L, D], bias [H, L, L] fp32."""
        bias = sqrt_alibi_bias(self.slopes, input_ids.shape[1], input_ids.device)
        return self.tok_embeddings.word_embeddings(input_ids), bias


class LlmAttention(nn.Module):
    """Norm and attention of one layer over a slice of the heads; the residual is the caller's."""

    def __init__(self, config: StepLLMConfig, shards: int = 1) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, shards)

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """tokens [1, L, D], bias [H, L, L] -> partial [1, L, D]."""
        return self.attention(self.attention_norm(tokens), bias)


class LlmFeedForward(nn.Module):
    """Norm and feed-forward of one layer over a slice of the hidden channels; the residual is the caller's."""

    def __init__(self, config: StepLLMConfig, shards: int = 1) -> None:
        super().__init__()
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config.width, config.ffn_width // shards)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [1, L, D] -> partial [1, L, D]."""
        return self.feed_forward(self.ffn_norm(tokens))


class ShardedStepLLM:
    """Called like the graph `step_llm`, on every rank of a tensor-parallel group at once; each gets the whole result.

    `graphs` are this rank's `step_llm_embed`, `step_llm_attn_NN` and `step_llm_ff_NN`.
    """

    def __init__(self, graphs: Mapping[str, Graph], config: StepLLMConfig, communicator: Communicator) -> None:
        self._embed = graphs["step_llm_embed"]
        self._layers = [
            (graphs[f"step_llm_attn_{i:02d}"], graphs[f"step_llm_ff_{i:02d}"]) for i in range(config.num_layers)
        ]
        self._ranks = communicator

    def __call__(self, input_ids: Tensor) -> dict[str, Tensor]:
        """input_ids [1, L] int64, the same on every rank -> {"llm_states": [1, L, D]}."""
        start = self._embed(input_ids=input_ids)
        x, bias = start["tokens"], start["bias"]
        for attention, feed_forward in self._layers:
            x = x + self._ranks.sum_tp(attention(tokens=x, bias=bias)["partial"]).wait()
            x = x + self._ranks.sum_tp(feed_forward(tokens=x)["partial"]).wait()
        return {"llm_states": x}


def llm_graph_names(num_layers: int) -> list[str]:
    """Names of the graphs that ShardedStepLLM needs."""
    return ["step_llm_embed", *(f"step_llm_{piece}_{i:02d}" for i in range(num_layers) for piece in ("attn", "ff"))]


def llm_embed_spec(config: StepLLMConfig, dtype: str, tensor_parts: int = 1) -> EngineSpec:
    return EngineSpec(
        "step_llm_embed",
        inputs=(TensorSpec("input_ids", "int64", (1, "llm_tokens")),),
        outputs=(_tokens("tokens", config, dtype), _bias(config, tensor_parts)),
        dims={"llm_tokens": LLM_TOKENS},
    )


def llm_attention_spec(config: StepLLMConfig, dtype: str, index: int, tensor_parts: int = 1) -> EngineSpec:
    return EngineSpec(
        f"step_llm_attn_{index:02d}",
        inputs=(_tokens("tokens", config, dtype), _bias(config, tensor_parts)),
        outputs=(_tokens("partial", config, dtype),),
        dims={"llm_tokens": LLM_TOKENS},
    )


def llm_feed_forward_spec(config: StepLLMConfig, dtype: str, index: int) -> EngineSpec:
    return EngineSpec(
        f"step_llm_ff_{index:02d}",
        inputs=(_tokens("tokens", config, dtype),),
        outputs=(_tokens("partial", config, dtype),),
        dims={"llm_tokens": LLM_TOKENS},
    )


def _tokens(name: str, config: StepLLMConfig, dtype: str) -> TensorSpec:
    return TensorSpec(name, dtype, (1, "llm_tokens", config.width))


def _bias(config: StepLLMConfig, tensor_parts: int) -> TensorSpec:
    return TensorSpec("bias", "float32", (config.num_heads // tensor_parts, "llm_tokens", "llm_tokens"))
