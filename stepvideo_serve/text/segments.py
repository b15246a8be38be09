"""Step-LLM cut where tensor-parallel ranks must add up, what each piece takes and gives, and the pieces put together.

    embed, then per layer   attn ─Σ─ ff ─Σ─        Σ = sum over the ranks' partial results

Each rank holds a slice of the key/value groups with their heads, and of the feed-forward's hidden channels; token
embeddings and norms are whole on all. Source: Megatron-LM (arXiv 1909.08053), section 3.
Axes: L tokens, D width, H heads of this rank.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.parallel.communicator import Communicator
from stepvideo_serve.text.states import LLM_MAX_TOKENS
from stepvideo_serve.text.step_llm import (
    Attention,
    FeedForward,
    Layer,
    RMSNorm,
    StepLLMConfig,
    TokenEmbeddings,
    alibi_slopes,
    sqrt_alibi_bias,
)
from stepvideo_serve.weights.cuts import WHOLE, TensorPart

Graph = Callable[..., dict[str, Tensor]]
LLM_TOKENS = Dim(min=2, opt=128, max=LLM_MAX_TOKENS)


class LlmEmbed(nn.Module):
    """Token ids -> embeddings."""

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__()
        self.tok_embeddings = TokenEmbeddings(config.vocab_size, config.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [1, L] int64 -> [1, L, D]."""
        return self.tok_embeddings.word_embeddings(input_ids)


class LlmAttention(nn.Module):
    """Norm and attention of one layer over the heads of `part`; the residual is the caller's.

    The slopes are those of the part's own heads: a slice of the list for all heads, not a list for fewer.
    """

    def __init__(self, config: StepLLMConfig, part: TensorPart = WHOLE) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, part.count)
        begin, end = part.of(config.num_heads)
        self.slopes = alibi_slopes(config.num_heads)[begin:end]

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [1, L, D] -> partial [1, L, D]."""
        bias = sqrt_alibi_bias(self.slopes, tokens.shape[1], tokens.device)
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


class SlopesOutside(nn.Module):
    """LlmAttention with the slopes of its heads as a tensor, which ranks differ in: it may be an input of the graph."""

    def __init__(self, plain: LlmAttention) -> None:
        super().__init__()
        self.attention_norm, self.attention = plain.attention_norm, plain.attention
        self.register_buffer("slopes", torch.tensor(plain.slopes), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [1, L, D] -> partial [1, L, D]."""
        bias = sqrt_alibi_bias(self.get_buffer("slopes"), tokens.shape[1], tokens.device)
        out: Tensor = self.attention(self.attention_norm(tokens), bias)
        return out


class LlmLayer(Layer):
    """One layer whole as a graph of its own: the bias of all heads is made in it."""

    def __init__(self, config: StepLLMConfig) -> None:
        super().__init__(config)
        self.slopes = alibi_slopes(config.num_heads)

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]  # without the bias
        """tokens [1, L, D] -> [1, L, D]."""
        return super().forward(tokens, sqrt_alibi_bias(self.slopes, tokens.shape[1], tokens.device))


class ShardedStepLLM:
    """Called like the graph `step_llm`, on every rank of a tensor-parallel group at once; each gets the whole result.

    `graphs` are this rank's `step_llm_embed`, `step_llm_attn_NN` and `step_llm_ff_NN`.
    """

    def __init__(self, graphs: Mapping[str, Graph], config: StepLLMConfig, communicator: Communicator) -> None:
        names = llm_graph_names(config.num_layers)
        self._config = config
        self._embed, *self._halves = (graphs[name] for name in names)
        self._ranks = communicator

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises EngineError for input_ids of a shape that the graphs do not take; runs nothing."""
        llm_embed_spec(self._config, "float32").check_shapes({"input_ids": shape})

    def __call__(self, input_ids: Tensor) -> dict[str, Tensor]:
        """input_ids [1, L] int64, the same on every rank -> {"llm_states": [1, L, D]}."""
        x = self._embed(input_ids=input_ids)["tokens"]
        for half in self._halves:
            x = x + self._ranks.sum_tp(half(tokens=x)["partial"]).wait()
        return {"llm_states": x}


class LayeredStepLLM(EngineRunner):
    """The graph `step_llm` as its embeddings and one graph after the other, `step_llm_embed` and `step_llm_layer_NN`.

    spec  the signature of the whole
    """

    def __init__(self, spec: EngineSpec, graphs: Mapping[str, EngineRunner], num_layers: int) -> None:
        self._embed, *self._layers = (graphs[name] for name in llm_layer_names(num_layers))
        super().__init__(spec, self._embed.device, f"step_llm of {num_layers + 1} graphs, {self._embed.engine_id}")

    def _run(self, inputs: dict[str, Tensor], dims: dict[str, int]) -> dict[str, Tensor]:
        del dims
        x = self._embed(**inputs)["tokens"]
        for layer in self._layers:
            x = layer(tokens=x)["tokens_out"]
        return {"llm_states": x}

    def _release(self) -> None:
        for runner in (self._embed, *self._layers):
            runner.close()


def llm_graph_names(num_layers: int) -> list[str]:
    """Names of the graphs that ShardedStepLLM needs, in the order in which they run."""
    return ["step_llm_embed", *(f"step_llm_{half}_{i:02d}" for i in range(num_layers) for half in ("attn", "ff"))]


def llm_layer_names(num_layers: int) -> list[str]:
    """Names of the graphs of a Step-LLM in whole layers, in the order in which they run."""
    return ["step_llm_embed", *(f"step_llm_layer_{i:02d}" for i in range(num_layers))]


def llm_layer_spec(config: StepLLMConfig, dtype: str, index: int) -> EngineSpec:
    """Layer `index`, whole."""
    shape = (1, "llm_tokens", config.width)
    return EngineSpec(
        f"step_llm_layer_{index:02d}",
        inputs=(TensorSpec("tokens", dtype, shape),),
        outputs=(TensorSpec("tokens_out", dtype, shape),),
        dims={"llm_tokens": LLM_TOKENS},
    )


def llm_embed_spec(config: StepLLMConfig, dtype: str) -> EngineSpec:
    return EngineSpec(
        "step_llm_embed",
        inputs=(TensorSpec("input_ids", "int64", (1, "llm_tokens")),),
        outputs=(TensorSpec("tokens", dtype, (1, "llm_tokens", config.width)),),
        dims={"llm_tokens": LLM_TOKENS},
    )


def llm_half_spec(config: StepLLMConfig, dtype: str, half: str, index: int) -> EngineSpec:
    """One half ("attn" or "ff") of layer `index`; the same for every number of ranks."""
    shape = (1, "llm_tokens", config.width)
    return EngineSpec(
        f"step_llm_{half}_{index:02d}",
        inputs=(TensorSpec("tokens", dtype, shape),),
        outputs=(TensorSpec("partial", dtype, shape),),
        dims={"llm_tokens": LLM_TOKENS},
    )
