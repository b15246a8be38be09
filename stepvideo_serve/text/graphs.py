"""What the two text encoders take and give as graphs."""

from transformers import BertConfig

from stepvideo_serve.engine.spec import Dim, EngineSpec, TensorSpec
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS
from stepvideo_serve.text.step_llm import StepLLMConfig


def step_llm_spec(config: StepLLMConfig, dtype: str) -> EngineSpec:
    return EngineSpec(
        "step_llm",
        inputs=(TensorSpec("input_ids", "int64", (1, "llm_tokens")),),
        outputs=(TensorSpec("llm_states", dtype, (1, "llm_tokens", config.width)),),
        dims={"llm_tokens": Dim(min=2, opt=128, max=LLM_MAX_TOKENS)},
    )


def hunyuan_clip_spec(config: BertConfig, dtype: str) -> EngineSpec:
    return EngineSpec(
        "hunyuan_clip",
        inputs=(
            TensorSpec("input_ids", "int64", (1, CLIP_TOKENS)),
            TensorSpec("attention_mask", "int64", (1, CLIP_TOKENS)),
        ),
        outputs=(
            TensorSpec("clip_states", dtype, (1, CLIP_TOKENS, config.hidden_size)),
            TensorSpec("pooled", dtype, (1, config.hidden_size)),
        ),
        dims={},
    )
