"""The model repository: the interface in every config.pbtxt, and the size of the adapters."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from stepvideo_serve.request.field import Default, Need
from stepvideo_serve.request.fields import fields_for
from stepvideo_serve.request.rules import Noise

MAX_ADAPTER_LINES = 25

TEXT_SCALAR = ("TYPE_STRING", [1])
INT_SCALAR = ("TYPE_INT32", [1])
LONG_SCALAR = ("TYPE_INT64", [1])
FLOAT_SCALAR = ("TYPE_FP32", [1])
STATES = ("TYPE_FP32", [-1, -1])
IMAGE_LATENT = ("TYPE_FP32", [-1, -1, -1])
LATENTS = ("TYPE_FP32", [-1, -1, -1, -1])
FRAMES = ("TYPE_UINT8", [-1, -1, -1, 3])

Tensors = Mapping[str, tuple[str, list[int]]]

PROGRESS: Tensors = {
    "STEP": INT_SCALAR,
    "TOTAL_STEPS": INT_SCALAR,
    "ELAPSED_S": FLOAT_SCALAR,
    "EVALUATIONS": INT_SCALAR,
    "QUEUE_POSITION": INT_SCALAR,
    "START_IN_S": FLOAT_SCALAR,
    "PREVIEW": TEXT_SCALAR,
}
RESULT: Tensors = {
    "VIDEO": TEXT_SCALAR,
    "FRAMES": FRAMES,
    "LATENTS": LATENTS,
    "SEED": LONG_SCALAR,
    "REPORT": TEXT_SCALAR,
}
DENOISER_INPUTS: Tensors = {
    "RUN_ID": TEXT_SCALAR,
    "KIND": TEXT_SCALAR,
    "CANCEL_RUN": TEXT_SCALAR,
    "NEXT_OF": TEXT_SCALAR,
    "NOTE": TEXT_SCALAR,
    "latents": LATENTS,
    "condition": IMAGE_LATENT,
    "input_ids": ("TYPE_INT64", [-1, -1]),
    "positive_llm": STATES,
    "positive_clip": STATES,
    "negative_llm": STATES,
    "negative_clip": STATES,
    "SETTINGS": TEXT_SCALAR,
    "PRIORITY": INT_SCALAR,
    "TIMEOUT_S": FLOAT_SCALAR,
}
DENOISER_OUTPUTS: Tensors = {
    "STEP": INT_SCALAR,
    "TOTAL_STEPS": INT_SCALAR,
    "STEP_SECONDS": FLOAT_SCALAR,
    "EVALUATIONS": INT_SCALAR,
    "QUEUE_POSITION": INT_SCALAR,
    "START_IN_S": FLOAT_SCALAR,
    "preview": FRAMES,
    "latents": LATENTS,
    "frames": FRAMES,
    "llm_states": ("TYPE_FP32", [1, -1, -1]),
    "REPORT": TEXT_SCALAR,
    "ENDED": ("TYPE_BOOL", [1]),
}
DECODER_INPUTS: Tensors = {
    "RUN_ID": TEXT_SCALAR,
    "CANCEL_RUN": TEXT_SCALAR,
    "NEXT_OF": TEXT_SCALAR,
    "latents": LATENTS,
}


def declared(need: Need, required: bool) -> Tensors:
    """The inputs that somebody needs, by the table of fields."""
    return {
        field.name: LATENTS
        if isinstance(field.rule, Noise)
        else ("TYPE_STRING" if field.dtype == "BYTES" else f"TYPE_{field.dtype}", [1])
        for field in fields_for(need)
        if (field.default is Default.REQUIRED) == required
    }


PUBLIC_REQUIRED = declared("request", required=True)
PUBLIC_OPTIONAL = declared("request", required=False)
QUOTE_INPUTS = declared("quote", required=False)
QUOTE_OUTPUTS: Tensors = {
    "SECONDS": FLOAT_SCALAR,
    "GPU_SECONDS": FLOAT_SCALAR,
    "PEAK_MEMORY_MIB": FLOAT_SCALAR,
    "QUEUE_WAIT_S": FLOAT_SCALAR,
    "REPORT": TEXT_SCALAR,
}

# model: (decoupled, instances, required inputs, optional inputs, outputs)
MODELS: Mapping[str, tuple[bool, int, Tensors, Tensors, Tensors]] = {
    "ti2v": (True, 1, PUBLIC_REQUIRED, PUBLIC_OPTIONAL, {**PROGRESS, **RESULT}),
    "ti2v_unary": (False, 1, PUBLIC_REQUIRED, PUBLIC_OPTIONAL, RESULT),
    "text_encoder": (
        False,
        1,
        {"PROMPT": TEXT_SCALAR},
        {},
        {"LLM_STATES": STATES, "CLIP_STATES": STATES, "CACHED": ("TYPE_BOOL", [1])},
    ),
    "vae_encoder": (
        False,
        1,
        {"PIXELS": ("TYPE_FP32", [3, -1, -1]), "NOISE": IMAGE_LATENT},
        {},
        {"LATENT": IMAGE_LATENT, "CACHED": ("TYPE_BOOL", [1])},
    ),
    "dit_denoiser": (False, 1, {}, DENOISER_INPUTS, DENOISER_OUTPUTS),
    "ti2v_quote": (False, 1, {}, QUOTE_INPUTS, QUOTE_OUTPUTS),
    "ti2v_cancel": (
        False,
        1,
        {},
        {"REQUEST_ID": TEXT_SCALAR},
        {"CANCELLED": ("TYPE_BOOL", [1]), "REPORT": TEXT_SCALAR},
    ),
    "vae_decoder": (False, 1, {}, DECODER_INPUTS, {"frames": FRAMES, "ENDED": ("TYPE_BOOL", [1])}),
}


def read_config(path: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())


def tensors(entries: list[model_config_pb2.ModelInput]) -> dict[str, tuple[str, list[int]]]:
    return {entry.name: (model_config_pb2.DataType.Name(entry.data_type), list(entry.dims)) for entry in entries}


def test_prompt_and_image_alone_are_required() -> None:
    assert PUBLIC_REQUIRED == {"PROMPT": TEXT_SCALAR, "IMAGE": TEXT_SCALAR}
    assert PUBLIC_OPTIONAL["SEED"] == LONG_SCALAR
    assert PUBLIC_OPTIONAL["CFG_SCALE"] == QUOTE_INPUTS["CFG_SCALE"] == FLOAT_SCALAR


def test_the_repository_holds_these_models(root: Path) -> None:
    assert {path.name for path in (root / "model_repository").iterdir()} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_interface(root: Path, name: str) -> None:
    decoupled, instances, required, optional, outputs = MODELS[name]
    config = read_config(root / "model_repository" / name / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == (name, "python", 0)
    assert config.model_transaction_policy.decoupled == decoupled
    assert [(group.kind, group.count) for group in config.instance_group] == [
        (model_config_pb2.ModelInstanceGroup.KIND_CPU, instances)
    ]
    assert tensors([entry for entry in config.input if not entry.optional]) == required
    assert tensors([entry for entry in config.input if entry.optional]) == optional
    assert tensors(list(config.output)) == outputs


@pytest.mark.parametrize("name", MODELS)
def test_adapter_is_small(root: Path, name: str) -> None:
    adapter = root / "model_repository" / name / "1" / "model.py"
    lines = adapter.read_text(encoding="utf-8").splitlines()
    assert 0 < len(lines) <= MAX_ADAPTER_LINES, f"{adapter} is an adapter: move its logic to stepvideo_serve/serving"
