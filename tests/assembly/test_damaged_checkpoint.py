"""Each thing that can be wrong with a checkpoint is one CheckpointError that names the file and the key."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

from export.tiny.tokenizers import CLIP_SPECIALS, sentences
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.runners import open_manifest
from stepvideo_serve.config import ModelConfig, ServeConfig
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.errors import CheckpointError, EngineError
from tests.assembly.edits import clip_as_state_dict, edit_json, linked_copy, replace_text, rewrite, truncate

State = dict[str, Tensor]
DIT_CONFIG = "transformer/config.json"
DIT_FILE_2 = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
DIT_INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
LLM_CONFIG = "step_llm/config.json"
LLM_FILE = "step_llm/model.safetensors"
STEP_MODEL = "step_llm/step1_chat_tokenizer.model"
VOCABULARY = "hunyuan_clip/tokenizer/vocab.txt"
CLIP_SETTINGS = "hunyuan_clip/tokenizer/tokenizer_config.json"
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


def lines_of(change: Callable[[list[str]], object]) -> Callable[[Path], None]:
    """Changes the lines of the CLIP's vocabulary."""

    def do(folder: Path) -> None:
        lines = (folder / VOCABULARY).read_text(encoding="utf-8").splitlines(keepends=True)
        change(lines)
        replace_text(folder / VOCABULARY, "".join(lines))

    return do


def other_sentencepiece_model(**options: Any) -> Callable[[Path], None]:
    """A model that sentencepiece trains by its own rules, in the place of Step-1's."""

    def do(folder: Path) -> None:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences()), model_writer=model, minloglevel=2, num_threads=1, **options
        )
        (folder / STEP_MODEL).unlink()
        (folder / STEP_MODEL).write_bytes(model.getvalue())

    return do


def without_bytes(folder: Path) -> None:
    other_sentencepiece_model(vocab_size=500, control_symbols=["<|EOT|>", "<|BOT|>"])(folder)
    edit_json(folder / LLM_CONFIG, lambda config: config.update(orig_vocab_size=500))


def other_tokenizer_json(folder: Path) -> None:
    """A tokenizer.json of another vocabulary beside vocab.txt, which transformers would read instead."""
    vocabulary: dict[str, int] = {piece: number for number, piece in enumerate([*CLIP_SPECIALS.values(), "cat", "dog"])}
    model: dict[str, Any] = {"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]"}
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    text = json.dumps({"version": "1.0", "added_tokens": [], **parts, "model": model})
    replace_text(folder / "hunyuan_clip/tokenizer/tokenizer.json", text)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0\nsize 9\n"
POINTED = {
    DIT_CONFIG: "dit",
    DIT_FILE_2: "dit",
    DIT_INDEX: "dit",
    LLM_CONFIG: "step_llm",
    LLM_FILE: "step_llm",
    STEP_MODEL: "step_tokenizer",
    CLIP_CONFIG: "clip",
    CLIP_FILE: "clip",
    VOCABULARY: "clip_tokenizer",
    CLIP_SETTINGS: "clip_tokenizer",
    VAE_FILE: "vae_decoder",
}
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
    Damage(
        "step-tokenizer-other-count",
        "step_tokenizer",
        other_sentencepiece_model(vocab_size=700, byte_fallback=True),
        (STEP_MODEL, "760", "700"),
    ),
    Damage(
        "step-tokenizer-other-pieces",
        "step_tokenizer",
        other_sentencepiece_model(vocab_size=760, byte_fallback=True),
        (STEP_MODEL, "<|EOT|>", "piece 3"),
    ),
    Damage(
        "step-tokenizer-no-bytes",
        "step_tokenizer",
        without_bytes,
        (STEP_MODEL, "256", "bytes"),
    ),
    Damage("clip-tokenizer", "clip_tokenizer", without(VOCABULARY), ("vocab.txt",)),
    Damage("clip-vocabulary-cut", "clip_tokenizer", lines_of(lambda lines: lines.pop()), (VOCABULARY, "lines")),
    Damage("clip-vocabulary-longer", "clip_tokenizer", lines_of(lambda lines: lines.append("cat\n")), (VOCABULARY,)),
    Damage(
        "clip-vocabulary-shifted",
        "clip_tokenizer",
        lines_of(lambda lines: lines.insert(0, lines.pop())),
        (VOCABULARY, "[PAD]", "shifted"),
    ),
    Damage(
        "clip-vocabulary-no-mask",
        "clip_tokenizer",
        lines_of(lambda lines: lines.__setitem__(4, "mask\n")),
        (VOCABULARY, "[MASK]"),
    ),
    Damage("clip-tokenizer-json", "clip_tokenizer", other_tokenizer_json, ("hunyuan_clip/tokenizer", "vocab.txt")),
    Damage("clip-settings-broken", "clip_tokenizer", instead(CLIP_SETTINGS, "{"), (CLIP_SETTINGS,)),
    *(Damage(f"pointer-{p}", part, instead(p, LFS_POINTER), (p, "git lfs pull")) for p, part in POINTED.items()),
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


def test_files_of_macos_are_no_weights(mini_checkpoint: Path, tmp_path: Path) -> None:
    """macOS writes `._name` beside each file on foreign disks and in archives."""
    folder = linked_copy(mini_checkpoint, tmp_path / "copy")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    checkpoint, whole = Checkpoint(folder), Checkpoint(mini_checkpoint)
    for part in ("dit", "step_llm", "clip", "vae_decoder", "step_tokenizer", "clip_tokenizer"):
        getattr(checkpoint, part)()
    assert checkpoint.identity == whole.identity


def reworded(folder: Path) -> None:
    """Two pieces change places: the count and the special pieces are as before."""
    lines_of(lambda lines: lines.insert(200, lines.pop()))(folder)


SETTINGS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "dit_config": ("dit", in_json(DIT_CONFIG, lambda c: c.update(caption_channels=[48, 33]))),
    "llm_config": ("llm", in_json(LLM_CONFIG, lambda c: c.update(layernorm_epsilon=1e-6))),
    "clip_config": ("clip", in_json(CLIP_CONFIG, lambda c: c.update(layer_norm_eps=1e-6))),
    "step_tokenizer": ("tokenizers", lambda folder: other_sentencepiece_model(vocab_size=500)(folder)),
    "clip_tokenizer": ("tokenizers", reworded),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_has_no_tensors_is_part_of_the_identity(name: str, mini_checkpoint: Path, tmp_path: Path) -> None:
    part, change = SETTINGS[name]
    folder = linked_copy(mini_checkpoint, tmp_path / "copy")
    whole = Checkpoint(mini_checkpoint)
    assert Checkpoint(folder).identity == whole.identity
    change(folder)
    changed = Checkpoint(folder)
    assert [key for key in whole.settings if changed.settings[key] != whole.settings[key]] == [name]
    if name != "dit_config":  # the weights do not fit this one
        assert changed.identity != whole.identity
        assert changed.digest(part) != whole.digest(part)


def test_a_server_compares_them_with_its_graphs(mini_checkpoint: Path, tmp_path: Path) -> None:
    """The manifest of the graphs names what they were exported with; an exchanged tokenizer is refused at the start."""
    folder, engines = linked_copy(mini_checkpoint, tmp_path / "copy"), tmp_path / "engines"
    engines.mkdir()
    whole = Checkpoint(folder)
    extra = {"dit_config": asdict(whole.dit_config), "settings": whole.settings}
    Manifest(checkpoint=whole.identity, precision="fp32", tools={}, graphs={}, extra=extra).save(engines)
    config = ServeConfig(ModelConfig(folder, engines))
    open_manifest(config)
    reworded(folder)
    with pytest.raises(EngineError, match="found those of another clip_tokenizer: restore"):
        open_manifest(config)
    Manifest(
        checkpoint=whole.identity, precision="fp32", tools={}, graphs={}, extra={"dit_config": extra["dit_config"]}
    ).save(engines)
    with pytest.raises(EngineError, match="export the graphs again"):
        open_manifest(config)
