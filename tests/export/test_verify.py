"""The tiny checkpoint with goldens of the official code, through the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export import verify
from export.to_onnx import export_graphs
from stepvideo_serve.assembly.checkpoint import Checkpoint
from tests.export.golden_copies import change_largest, copy_goldens

OFFICIAL = "the official code"
NO_GRAPH = "no graph of its own"


@pytest.fixture
def tiny_a(shared: Path) -> Path:
    """A checkpoint and its goldens in one folder."""
    return shared / "goldens" / "tiny-a"


def run_cli(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export.verify", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)


def verified(path: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON report of a run in this process."""
    status = verify.main([*map(str, arguments), "--json", str(path)])
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return status, report


def names(report: dict[str, Any], what: str) -> list[str]:
    return [row["entry"] for row in report[what]]


def test_modules_agree(root: Path, tiny_a: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    ran = run_cli(root, "--model-dir", tiny_a, "--goldens", tiny_a, "--json", path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["passed"]
    assert report["backend"] == "eager"
    assert len(report["compared"]) > 60
    assert all(row["passed"] and row["error"] <= row["allowed"] for row in report["compared"])
    reasons = {row["reason"] for row in report["not_compared"]}
    assert all(reason.startswith(OFFICIAL) for reason in reasons), reasons
    entries = json.loads((tiny_a / "goldens.json").read_text(encoding="utf-8"))["entries"]
    covered = [*names(report, "compared"), *report["inputs"], *names(report, "not_compared")]
    assert sorted(covered) == sorted(entries)
    table = {line.split()[0] for line in ran.stdout.splitlines() if line.endswith(" ok")}
    assert table == set(names(report, "compared"))
    assert ran.stdout.splitlines()[-1].startswith(f"passed: {len(table)} entries compared, 0 failed")
    assert "verify: dit: 15 entries" in ran.stderr.splitlines()


@pytest.mark.slow
def test_graphs_agree(tiny_a: Path, tmp_path: Path) -> None:
    status, report = verified(tmp_path / "report.json", "--model-dir", tiny_a, "--goldens", tiny_a, "--backend", "ort")
    assert status == verify.PASSED
    assert len(report["compared"]) > 60
    skipped = {row["entry"]: row["reason"] for row in report["not_compared"]}
    without_graph = {entry for entry, reason in skipped.items() if reason == NO_GRAPH}
    assert {"llm.layer0", "vae.enc.video17.mean", "vae.dec.single", "dit.block0.attn1"} <= without_graph
    assert all(reason == NO_GRAPH or reason.startswith(OFFICIAL) for reason in skipped.values())
    assert {"llm.y", "dit.block0", "dit_long.out", "e2e.frames_u8"} <= set(names(report, "compared"))


def test_graphs_of_an_export_are_the_ones_compared(tiny_a: Path, tmp_path: Path) -> None:
    goldens = copy_goldens(tiny_a, tmp_path / "goldens", ("clip.",))
    flipped = _with_flipped_weight(tiny_a, tmp_path / "checkpoint", CLIP_WEIGHTS, CLIP_WEIGHT)
    export_graphs(Checkpoint(flipped), tmp_path / "onnx", only=["hunyuan_clip"], show_progress=False)
    ort = ("--backend", "ort", "--onnx", tmp_path / "onnx")
    status, report = verified(tmp_path / "report.json", "--model-dir", tiny_a, "--goldens", goldens, *ort)
    assert status == verify.FAILED
    assert "clip.last_hidden_state" in [row["entry"] for row in report["compared"] if not row["passed"]]


@pytest.mark.parametrize(
    ("entry", "family"),
    [
        ("tok.llm.input_ids", "tok."),
        ("caption.clip_embedding_bf16", "caption."),
        ("vae.mix.output", "vae.mix."),
        ("sched.10.7.sigmas", "sched."),
        ("pre.square.64x112", "pre."),
        ("dit_long.out", "dit_long."),
    ],
)
def test_a_wrong_golden_is_named(
    entry: str, family: str, tiny_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = change_largest(entry, lambda value: value + 1 if value.dtype == torch.int64 else value * 1.02)
    goldens = copy_goldens(tiny_a, tmp_path / "goldens", (family,), edit)
    status, report = verified(tmp_path / "report.json", "--model-dir", tiny_a, "--goldens", goldens)
    assert status == verify.FAILED
    assert [row["entry"] for row in report["compared"] if not row["passed"]] == [entry]
    assert f"FAILED: {entry};" in capsys.readouterr().out


CLIP_WEIGHTS = "hunyuan_clip/clip_text_encoder/model.safetensors"
CLIP_WEIGHT = "encoder.layer.0.attention.output.dense.weight"


@pytest.mark.parametrize(
    ("file", "key", "family", "failing"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "transformer_blocks.1.ff.net.2.weight", "dit.", "dit.out"),
        ("step_llm/model.safetensors", "transformer.layers.1.attention.wo.weight", "llm.", "llm.y"),
        (CLIP_WEIGHTS, CLIP_WEIGHT, "clip.", "clip.last_hidden_state"),
        ("vae/vae_v2.safetensors", "encoder.mid.attn_1.proj_out.conv.weight", "vae.enc.image.", "vae.enc.image.mean"),
    ],
)
def test_a_wrong_weight_fails(file: str, key: str, family: str, failing: str, tiny_a: Path, tmp_path: Path) -> None:
    checkpoint = _with_flipped_weight(tiny_a, tmp_path / "checkpoint", file, key)
    goldens = copy_goldens(tiny_a, tmp_path / "goldens", (family,))
    status, report = verified(tmp_path / "report.json", "--model-dir", checkpoint, "--goldens", goldens)
    assert status == verify.FAILED
    assert failing in [row["entry"] for row in report["compared"] if not row["passed"]]


def _with_flipped_weight(source: Path, out: Path, file: str, suffix: str) -> Path:
    """A copy of the checkpoint in which the largest value of one tensor has the other sign."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("goldens.*", "images"))
    tensors = load_file(source / file)
    (key,) = [name for name in tensors if name.endswith(suffix)]
    change_largest(key, torch.neg)(tensors)
    (out / file).unlink()
    save_file(tensors, out / file)
    return out


def test_other_names_are_understood(tiny_a: Path, tmp_path: Path) -> None:
    """Prefixes are recognised by their inputs; an entry that nothing explains is listed and does no harm."""

    def rename(name: str) -> str:
        return name.replace("dit_long.", "dit_tall.").replace("e2e.", "e2e_b.")

    def add(tensors: dict[str, Tensor]) -> None:
        for name in ("dit_tall.block7", "mystery.x", "e2e_c.init_latents", "e2e_c.video"):
            tensors[name] = torch.zeros(1)

    settings = json.loads((tiny_a / "goldens.json").read_text(encoding="utf-8"))["e2e"]
    kept = ("dit_long.", "e2e.init", "e2e.enc", "e2e.latents1", "e2e.cond")
    goldens = copy_goldens(tiny_a, tmp_path / "goldens", kept, add, rename, e2e_b=settings)
    status, report = verified(tmp_path / "report.json", "--model-dir", tiny_a, "--goldens", goldens)
    assert status == verify.PASSED
    assert {"dit_tall.adaln", "dit_tall.out", "e2e_b.latents1", "e2e_b.cond"} <= set(names(report, "compared"))
    skipped = {row["entry"]: row["reason"] for row in report["not_compared"]}
    assert skipped == {
        "dit_tall.block7": "unknown entry",
        "mystery.x": "unknown entry",
        "e2e_c.video": "goldens.json does not say the settings of e2e_c",
    }


def test_nothing_compared_is_a_failure(tiny_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goldens = copy_goldens(tiny_a, tmp_path / "goldens", ("bf16.dit",))
    status, report = verified(tmp_path / "report.json", "--model-dir", tiny_a, "--goldens", goldens)
    assert status == verify.FAILED
    assert not report["compared"]
    assert "nothing could be compared" in capsys.readouterr().out


def test_a_missing_folder(root: Path, tiny_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = tmp_path / "none"
    ran = run_cli(root, "--model-dir", none, "--goldens", tiny_a)
    assert (ran.returncode, ran.stdout) == (verify.UNUSABLE, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("verify: ")
    assert str(none) in line
    assert verify.main(["--model-dir", str(tiny_a), "--goldens", str(none)]) == verify.UNUSABLE
    assert str(none) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [((), "--model-dir"), (("--onnx", "somewhere"), "--backend ort"), (("--backend", "ort", "--onnx", "none"), "none")],
)
def test_wrong_arguments(options: tuple[str, ...], says: str, tiny_a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model-dir", str(tiny_a)) if options else ()
    assert verify.main(["--goldens", str(tiny_a), *model, *options]) == verify.UNUSABLE
    assert says in capsys.readouterr().err


def test_a_truncated_checkpoint(tiny_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "checkpoint"
    shutil.copytree(tiny_a, broken, ignore=shutil.ignore_patterns("goldens.*", "images"))
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[: len(content) // 2])
    goldens = copy_goldens(tiny_a, tmp_path / "goldens", ("dit.",))
    assert verify.main(["--model-dir", str(broken), "--goldens", str(goldens)]) == verify.UNUSABLE
    assert str(weights) in capsys.readouterr().err


def test_goldens_of_another_model(tiny_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["dit.text"] = torch.cat([tensors["dit.text"]] * 2, dim=-1)

    goldens = copy_goldens(tiny_a, tmp_path / "goldens", ("dit.",), widen)
    assert verify.main(["--model-dir", str(tiny_a), "--goldens", str(goldens)]) == verify.UNUSABLE
    assert "dit.text must have 96 LLM channels" in capsys.readouterr().err


def test_a_golden_file_without_an_entry(tiny_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goldens = copy_goldens(tiny_a, tmp_path / "goldens", ("sched.",))
    tensors = load_file(goldens / "goldens.safetensors")
    del tensors["sched.4.13.sigmas"]
    save_file(tensors, goldens / "goldens.safetensors")
    assert verify.main(["--model-dir", str(tiny_a), "--goldens", str(goldens)]) == verify.UNUSABLE
    assert "sched.4.13.sigmas" in capsys.readouterr().err


def test_an_unwritable_report(tiny_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goldens = copy_goldens(tiny_a, tmp_path / "goldens", ("sched.",))
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "report.json"
    assert verify.main(["--model-dir", str(tiny_a), "--goldens", str(goldens), "--json", str(path)]) == verify.UNUSABLE
    assert str(path) in capsys.readouterr().err
