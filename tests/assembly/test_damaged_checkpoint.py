"""Each thing that can be wrong with a checkpoint is one CheckpointError that names the file and the key."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.errors import CheckpointError
from tests.assembly.edits import clip_as_state_dict, edit_json, linked_copy, replace_text, rewrite, truncate

State = dict[str, Tensor]
DIT_CONFIG = "transformer/config.json"
DIT_FILE_2 = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
DIT_INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
LLM_CONFIG = "step_llm/config.json"
LLM_FILE = "step_llm/model.safetensors"
STEP_MODEL = "step_llm/step1_chat_tokenizer.model"
CLIP_CONFIG = "hunyuan_clip/clip_text_encoder/config.json"
CLIP_FILE = "hunyuan_clip/clip_text_encoder/model.safetensors"
CLIP_STATE_DICT = "hunyuan_clip/clip_text_encoder/pytorch_model.bin"
VAE_FILE = "vae/vae_v2.safetensors"
DIT_KEY = "transformer_blocks.1.norm2.weight"
LLM_KEY = "transformer.layers.1.attention.wo.weight"
CLIP_KEY = "encoder.layer.0.output.dense.bias"
DECODER_KEY = "decoder.mid.attn_1.q.conv.weight"


class NotATensor:
    """Any object that a pickle may hold."""


@dataclass(frozen=True)
class Damage:
    """`do` is applied to a whole checkpoint; loading `part` must then say all of `named`."""

    name: str
    part: str
    do: Callable[[Path], object]
    named: tuple[str, ...]


def in_file(path: str, change: Callable[[State], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / path, change)


def in_json(path: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / path, change)


def instead(path: str, text: str) -> Callable[[Path], None]:
    return lambda folder: replace_text(folder / path, text)


def without(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


def cut(path: str) -> Callable[[Path], None]:
    return lambda folder: truncate(folder / path)


def state_dict_with(value: object) -> Callable[[Path], None]:
    return lambda folder: clip_as_state_dict(folder, extra={CLIP_KEY: value})


def widened(key: str) -> Callable[[State], object]:
    return lambda state: state.update({key: torch.cat([state[key], state[key]])})


def with_other_object(folder: Path) -> None:
    clip_as_state_dict(folder)
    torch.save([torch.zeros(2)], folder / CLIP_STATE_DICT)


def with_prefix_and_without(folder: Path) -> None:
    clip_as_state_dict(folder, extra={f"bert.{CLIP_KEY}": torch.zeros(32)})


def cut_state_dict(folder: Path) -> None:
    clip_as_state_dict(folder)
    truncate(folder / CLIP_STATE_DICT)


def second_index(folder: Path) -> None:
    replace_text(folder / "transformer/fp16.safetensors.index.json", "{}")


def first_shard_again(folder: Path) -> None:
    (folder / "transformer/diffusion_pytorch_model-00003-of-00002.safetensors").hardlink_to(folder / DIT_FILE_2)
    (folder / DIT_INDEX).unlink()


def folder_gone(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).rename(folder.parent / "gone")


UNKNOWN_SHARD = {"weight_map": {DIT_KEY: "diffusion_pytorch_model-00009-of-00009.safetensors"}}
SHARD_ELSEWHERE = {"weight_map": {DIT_KEY: "../vae/vae_v2.safetensors"}}

DAMAGES = [
    Damage("dit-missing-key", "dit", in_file(DIT_FILE_2, lambda s: s.pop(DIT_KEY)), (DIT_FILE_2, DIT_KEY)),
    Damage(
        "dit-unknown-key",
        "dit",
        in_file(DIT_FILE_2, lambda s: s.update({"lora.up": torch.ones(2)})),
        (DIT_FILE_2, "lora.up"),
    ),
    Damage("dit-shape", "dit", in_file(DIT_FILE_2, widened(DIT_KEY)), (DIT_FILE_2, DIT_KEY, "[256]", "[512]")),
    Damage("dit-truncated", "dit", cut(DIT_FILE_2), (DIT_FILE_2,)),
    Damage("dit-absent-shard", "dit", without(DIT_FILE_2), (DIT_INDEX, Path(DIT_FILE_2).name)),
    Damage(
        "dit-index-names-unknown",
        "dit",
        in_json(DIT_INDEX, lambda i: i.update(UNKNOWN_SHARD)),
        (DIT_INDEX, "00009-of-00009"),
    ),
    Damage(
        "dit-index-names-outside", "dit", in_json(DIT_INDEX, lambda i: i.update(SHARD_ELSEWHERE)), (DIT_INDEX, "../vae")
    ),
    Damage("dit-index-broken", "dit", instead(DIT_INDEX, "{"), (DIT_INDEX,)),
    Damage("dit-index-list", "dit", instead(DIT_INDEX, "[]"), (DIT_INDEX,)),
    Damage("dit-index-no-map", "dit", instead(DIT_INDEX, "{}"), (DIT_INDEX, "weight_map")),
    Damage("dit-index-empty-map", "dit", instead(DIT_INDEX, '{"weight_map": {}}'), (DIT_INDEX, "weight_map")),
    Damage("dit-two-indices", "dit", second_index, ("transformer", "fp16.safetensors.index.json")),
    Damage("dit-repeated-key", "dit", first_shard_again, (DIT_FILE_2, "00003-of-00002", "repeats")),
    Damage("dit-config-broken", "dit", instead(DIT_CONFIG, '{"num_layers": '), (DIT_CONFIG,)),
    Damage("dit-config-gap", "dit", in_json(DIT_CONFIG, lambda c: c.pop("num_layers")), (DIT_CONFIG, "num_layers")),
    Damage("dit-config-absent", "dit", without(DIT_CONFIG), (DIT_CONFIG,)),
    Damage(
        "dit-text-to-video",
        "dit",
        in_json(DIT_CONFIG, lambda c: c.update(use_additional_conditions=False)),
        (DIT_CONFIG, "use_additional_conditions"),
    ),
    Damage(
        "dit-fewer-layers",
        "dit",
        in_json(DIT_CONFIG, lambda c: c.update(num_layers=1)),
        (DIT_FILE_2, "transformer_blocks.1."),
    ),
    Damage("dit-absent-folder", "dit", folder_gone("transformer"), ("copy/transformer", "no such folder")),
    Damage("llm-missing-key", "step_llm", in_file(LLM_FILE, lambda s: s.pop(LLM_KEY)), (LLM_FILE, LLM_KEY)),
    Damage(
        "llm-quantised",
        "step_llm",
        in_file(LLM_FILE, lambda s: s.update({LLM_KEY: s[LLM_KEY].to(torch.float8_e4m3fn)})),
        (LLM_FILE, LLM_KEY, "F8_E4M3"),
    ),
    Damage("llm-config-broken", "step_llm", instead(LLM_CONFIG, "hidden_size: 48"), (LLM_CONFIG,)),
    Damage(
        "llm-config-gap", "step_llm", in_json(LLM_CONFIG, lambda c: c.pop("hidden_size")), (LLM_CONFIG, "hidden_size")
    ),
    Damage("llm-absent-file", "step_llm", without(LLM_FILE), ("step_llm", "pytorch_model.bin")),
    Damage("llm-absent-folder", "step_llm", folder_gone("step_llm"), ("copy/step_llm", "no such folder")),
    Damage("clip-shape", "clip", in_file(CLIP_FILE, widened(CLIP_KEY)), (CLIP_FILE, CLIP_KEY)),
    Damage("clip-config-broken", "clip", instead(CLIP_CONFIG, ""), (CLIP_CONFIG,)),
    Damage("clip-no-tensor", "clip", state_dict_with(3), (CLIP_STATE_DICT, CLIP_KEY, "int")),
    Damage("clip-integers", "clip", state_dict_with(torch.arange(32)), (CLIP_STATE_DICT, CLIP_KEY, "int64")),
    Damage("clip-object", "clip", state_dict_with(NotATensor()), (CLIP_STATE_DICT,)),
    Damage("clip-list", "clip", with_other_object, (CLIP_STATE_DICT, "list")),
    Damage("clip-twice", "clip", with_prefix_and_without, (CLIP_STATE_DICT, CLIP_KEY)),
    Damage("clip-truncated", "clip", cut_state_dict, (CLIP_STATE_DICT,)),
    Damage("vae-missing-key", "vae_decoder", in_file(VAE_FILE, lambda s: s.pop(DECODER_KEY)), (VAE_FILE, DECODER_KEY)),
    Damage(
        "vae-first-key",
        "vae_encoder",
        in_file(VAE_FILE, lambda s: s.pop("encoder.conv_in.conv.weight")),
        ("vae", "encoder.conv_in.conv.weight"),
    ),
    Damage("vae-unknown-key", "vae_encoder", in_file(VAE_FILE, lambda s: s.update(x=torch.ones(1))), (VAE_FILE, " x,")),
    Damage("vae-shape", "vae_encoder", in_file(VAE_FILE, widened(DECODER_KEY)), (VAE_FILE, DECODER_KEY)),
    Damage("vae-truncated", "vae_encoder", cut(VAE_FILE), (VAE_FILE,)),
    Damage("vae-absent-file", "vae_decoder", without(VAE_FILE), (VAE_FILE,)),
    Damage("vae-not-safetensors", "vae_decoder", instead(VAE_FILE, "<!DOCTYPE html>"), (VAE_FILE,)),
    Damage("step-tokenizer", "step_tokenizer", instead(STEP_MODEL, "no"), (STEP_MODEL,)),
    Damage("step-tokenizer-absent", "step_tokenizer", without(STEP_MODEL), (STEP_MODEL,)),
    Damage("clip-tokenizer", "clip_tokenizer", without("hunyuan_clip/tokenizer/vocab.txt"), ("vocab.txt",)),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damage_is_named(damage: Damage, mini_checkpoint: Path, tmp_path: Path) -> None:
    folder = linked_copy(mini_checkpoint, tmp_path / "copy")
    damage.do(folder)
    with pytest.raises(CheckpointError) as caught:
        getattr(Checkpoint(folder), damage.part)()
    message = str(caught.value)
    for part in damage.named:
        assert part in message
    assert "\n" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint(tmp_path / "absent")


def test_damage_to_one_part_leaves_the_others_usable(mini_checkpoint: Path, tmp_path: Path) -> None:
    folder = linked_copy(mini_checkpoint, tmp_path / "copy")
    (folder / LLM_FILE).unlink()
    checkpoint = Checkpoint(folder)
    checkpoint.clip()
    checkpoint.vae_encoder()
    checkpoint.dit_block(0)


def test_a_block_that_does_not_exist(mini_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.9\."):
        Checkpoint(mini_checkpoint).dit_block(9)
