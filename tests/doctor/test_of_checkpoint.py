"""A checkpoint with something wrong: the doctor names the file, and the command that fetches it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stepvideo_serve.doctor.finding import Level
from tests.doctor.conftest import Examined

HF = "hf download stepfun-ai/stepvideo-ti2v"


def shard(model: Path) -> Path:
    """One of several of the DiT."""
    found = sorted((model / "transformer").glob("*.safetensors"))
    assert len(found) > 1
    return found[-1]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def test_a_whole_one(examined: Examined, model: Path) -> None:
    found = examined()
    assert [row.level for check in ("checkpoint", "tokenizers") for row in found[check]] == [Level.OK, Level.OK]
    assert f"{model} is complete" in found["checkpoint"][0].found


def test_a_shard_that_is_missing(examined: Examined, model: Path) -> None:
    path = shard(model)
    path.unlink()
    [row] = examined()["checkpoint"]
    assert (row.level, row.found) == (Level.FAULT, f"{path} is missing.")
    assert row.remedy == f"{HF} transformer/{path.name} --local-dir {model}"


def test_every_file_that_is_missing_is_named(examined: Examined, model: Path) -> None:
    gone = ["hunyuan_clip/tokenizer/vocab.txt", "step_llm/config.json", "vae/vae_v2.safetensors"]
    for name in gone:
        (model / name).unlink()
    found = examined()
    assert sorted(row.found for row in found["checkpoint"]) == [f"{model / name} is missing." for name in gone]
    [row] = found["tokenizers"]
    assert (row.level, "must be there first" in row.found) == (Level.UNSEEN, True)


def test_a_part_without_weights_and_no_folder_at_all(examined: Examined, model: Path) -> None:
    for path in (model / "step_llm").glob("model*"):
        path.unlink()
    [row] = examined()["checkpoint"]
    assert row.remedy == f"{HF} --include 'step_llm/*' --local-dir {model}"
    model.rename(model.with_name("elsewhere"))
    [row] = examined()["checkpoint"]
    assert row.remedy == f"{HF} --local-dir {model}"


@pytest.mark.parametrize(("breaks", "said"), [(truncated, "whole safetensors file"), (pointer, "a pointer of Git LFS")])
def test_a_shard_that_is_not_whole(examined: Examined, model: Path, breaks: Callable[[Path], None], said: str) -> None:
    path = shard(model)
    breaks(path)
    [row] = examined()["checkpoint"]
    assert row.level is Level.FAULT
    assert str(path) in row.found
    assert said in row.found
    assert row.remedy == f"{HF} transformer/{path.name} --local-dir {model} --force-download"


@pytest.mark.parametrize(
    ("file", "key"),
    [("transformer/config.json", "num_layers"), ("step_llm/config.json", "num_layers")],
)
def test_weights_of_another_model(examined: Examined, model: Path, file: str, key: str) -> None:
    path = model / file
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, key: values[key] + 1}), encoding="utf-8")
    [row] = examined()["checkpoint"]
    assert row.level is Level.FAULT
    assert "which is missing" in row.found
    assert "use the files of one checkpoint" in row.remedy


@pytest.mark.parametrize("file", ["step_llm/step1_chat_tokenizer.model", "hunyuan_clip/tokenizer/vocab.txt"])
def test_a_tokenizer_that_is_not_whole(examined: Examined, model: Path, file: str) -> None:
    truncated(model / file)
    [row] = examined()["tokenizers"]
    assert row.level is Level.FAULT
    assert str(model / file) in row.found
    assert row.remedy.startswith(HF)
    assert row.remedy.endswith("--force-download")


def test_files_that_others_may_write(examined: Examined, model: Path) -> None:
    (model / "transformer/config.json").chmod(0o666)
    rows = examined()["rights"]
    assert {row.level for row in rows} == {Level.WARNING}
    assert "may write" in rows[0].found
