"""The tiny checkpoint: the same bytes again, whole or not at all, official in form, and with a picture in it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors import safe_open

from export.tiny.config import TinyConfig
from export.tiny.tokenizers import CONTROL_SYMBOLS, STEP_PIECES, USER_SYMBOLS, clip_vocabulary, train_step_model
from export.tiny_checkpoint import MARKER, main, make, random_state, save_weights
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.errors import ExportError
from stepvideo_serve.vae.layers import NORM_GROUPS
from stepvideo_serve.weights.files import file_digest
from tests.mini import normal

MAX_BYTES = 48 << 20


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_digest(path) for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tiny_checkpoint)
    assert sum(path.stat().st_size for path in tiny_checkpoint.rglob("*")) < MAX_BYTES


def test_the_layout_is_the_official_one(tiny_checkpoint: Path) -> None:
    assert set(digests(tiny_checkpoint)) == {
        MARKER,
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "step_llm/config.json",
        "step_llm/model.safetensors",
        "step_llm/step1_chat_tokenizer.model",
        "hunyuan_clip/clip_text_encoder/config.json",
        "hunyuan_clip/clip_text_encoder/model.safetensors",
        "hunyuan_clip/tokenizer/special_tokens_map.json",
        "hunyuan_clip/tokenizer/tokenizer_config.json",
        "hunyuan_clip/tokenizer/vocab.txt",
        "vae/vae_v2.safetensors",
    }
    for path in tiny_checkpoint.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_it_is_made_once_per_seed(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    assert make(out, seed=1)
    first = digests(out)
    stamp = (out / MARKER).stat().st_mtime_ns
    assert not make(out, seed=1)
    assert (out / MARKER).stat().st_mtime_ns == stamp
    assert make(out, seed=2)
    second = digests(out)
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {MARKER, *(name for name in first if name.endswith(".safetensors"))}
    assert list(tmp_path.iterdir()) == [out]


def test_one_made_by_other_code_is_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    out.mkdir()
    (out / MARKER).write_text(json.dumps({"seed": 7, "made_by": "an earlier version"}), encoding="utf-8")
    (out / "left_over").touch()
    assert make(out)
    assert digests(out) == digests(tiny_checkpoint)


@pytest.mark.parametrize("name", ["precious.txt", "model.safetensors", "tiny_checkpoint.txt"])
def test_other_files_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    for out in (tmp_path, tmp_path / name):
        with pytest.raises(ExportError, match="must be absent, empty or an earlier tiny checkpoint"):
            make(out)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


def test_a_failed_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tiny"
    out.mkdir()
    monkeypatch.setattr("export.tiny_checkpoint.save_weights", _disk_full)
    with pytest.raises(OSError, match="No space left"):
        make(out)
    assert list(tmp_path.iterdir()) == [out]
    assert list(out.iterdir()) == []


def _disk_full(*_: object) -> None:
    raise OSError("No space left on device")


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "tiny"
    monkeypatch.setattr(sys, "argv", ["tiny_checkpoint", "--out", str(out), "--seed", "3"])
    assert main() == 0
    assert "seed 3 written to" in capsys.readouterr().out
    assert main() == 0
    assert "seed 3 is already in" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tiny_checkpoint", "--out", str(tmp_path)])
    assert main() == 2
    assert "must be absent" in capsys.readouterr().err


def test_no_norm_group_has_a_single_channel() -> None:
    """It would cancel the bias of the convolution before it, and a wrong bias would go unnoticed."""
    vae = TinyConfig().vae
    for width in (vae.encoder_stem, *vae.encoder_widths, *vae.decoder_widths):
        assert width > NORM_GROUPS


def test_networks_that_do_not_fit_together_are_refused() -> None:
    config = TinyConfig()
    with pytest.raises(ExportError, match=r"widths \(96, 64, 8\)"):
        replace(config, dit=replace(config.dit, llm_channels=64))
    with pytest.raises(ExportError, match=f"vocabulary of {STEP_PIECES}"):
        replace(config, llm=replace(config.llm, vocab_size=512))


def test_weights_depend_on_key_shape_and_seed_only() -> None:
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (4, 8), "b.weight": (4, 8), "b.bias": (4,)}
    state = random_state(shapes, 1)
    assert list(state) == list(shapes)
    assert all(tensor.dtype == torch.bfloat16 and tuple(tensor.shape) == shapes[key] for key, tensor in state.items())
    assert torch.equal(random_state({"b.weight": (4, 8)}, 1)["b.weight"], state["b.weight"])
    assert not torch.equal(state["a.weight"], state["b.weight"])
    assert not torch.equal(random_state(shapes, 2)["a.weight"], state["a.weight"])


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_shards_are_about_equal(tmp_path: Path, shards: int) -> None:
    state = {f"key{i:02d}": normal(100) for i in range(40)}
    save_weights(tmp_path, "model", state, shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == 40 * 400
    assert index["weight_map"].keys() == state.keys()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    for file in files:
        with safe_open(file, framework="pt") as part:
            keys = set(part.keys())
        assert keys == {key for key, name in index["weight_map"].items() if name == file.name}
        assert abs(len(keys) - 40 / shards) <= 1


def test_the_step_tokenizer_has_the_official_settings() -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=train_step_model())
    assert model.get_piece_size() == STEP_PIECES
    assert [model.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    for index, name in enumerate(CONTROL_SYMBOLS, start=3):
        assert model.piece_to_id(f"<|{name}|>") == index
        assert model.is_control(index)
    for name in USER_SYMBOLS:
        index = model.piece_to_id(f"<|{name}|>")
        assert not model.is_control(index)
        assert index in model.encode_as_ids(f"a <|{name}|> b")
    for text in ("A  boat, 2024.", "一艘小船，１２", "emoji 🚀 and 龘", " leading and trailing "):
        assert model.decode(model.encode_as_ids(text)) == text


def test_the_clip_vocabulary_has_no_repeats() -> None:
    vocabulary = clip_vocabulary()
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(vocabulary)) == len(vocabulary)
    assert {"a", "##a", "camera", "镜", "，"} <= set(vocabulary)


def test_it_decodes_noise_to_a_colourful_picture(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)
    with torch.inference_mode():
        video = checkpoint.vae_decoder()(normal(1, 3, checkpoint.vae_config.z_channels, 2, 3))[0]
    assert (video.abs() < 1).float().mean() > 0.95
    assert (video.std(dim=(2, 3)) > 0.1).all(), "every frame and colour varies over the picture"
    assert float(video.diff(dim=0).abs().mean()) > 0.01, "something moves"
