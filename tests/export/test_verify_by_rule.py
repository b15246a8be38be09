"""Goldens whose weights are made by rule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from export import verify
from export.goldens.weight_rule import made_by_rule, weight_for
from stepvideo_serve.dit.blocks import DiTBlock


@pytest.fixture
def cases(shared: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the DiT cases, small ones, with the JSON of one of them changed."""

    def copy(case: str, **changes: Any) -> Path:
        source, out = shared / "goldens" / "regen", tmp_path / "regen"
        out.mkdir()
        described = json.loads((source / "goldens.json").read_text(encoding="utf-8"))
        described["cases"][case] |= changes
        (out / "goldens.json").write_text(json.dumps(described), encoding="utf-8")
        (out / "goldens.safetensors").symlink_to(source / "goldens.safetensors")
        return out

    return copy


def test_small_cases_agree(cases: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--goldens", str(cases("r1"))]) == verify.PASSED
    out = capsys.readouterr().out
    assert "passed: 12 entries compared" in out
    assert "not compared (6): a text-to-video variant" in out


def test_another_motion_score_does_not(cases: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--goldens", str(cases("r1", ms=5.0))]) == verify.FAILED
    assert "FAILED: r1.out;" in capsys.readouterr().out


def test_weights_of_another_seed_do_not(cases: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--goldens", str(cases("r2", seed=1))]) == verify.FAILED
    assert "r2.weights" in capsys.readouterr().out.splitlines()[-1]


def test_incomplete_cases(cases: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--goldens", str(cases("r1", cfg={}))]) == verify.UNUSABLE
    assert "use_additional_conditions" in capsys.readouterr().err


def test_arguments(cases: Callable[..., Path], shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(cases("r1"))
    assert verify.main(["--goldens", folder, "--backend", "ort"]) == verify.UNUSABLE
    assert "--backend eager" in capsys.readouterr().err
    model = str(shared / "goldens" / "tiny-a")
    assert verify.main(["--goldens", folder, "--model-dir", model]) == verify.PASSED
    assert "--model-dir is not used" in capsys.readouterr().err


@pytest.mark.slow
def test_real_video_vae_widths_agree(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--goldens", str(shared / "goldens" / "regen")]) == verify.PASSED
    out = capsys.readouterr().out
    assert "passed: 20 entries compared" in out
    assert "real_width.dec" in out


@pytest.mark.slow
def test_medium_agrees(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--goldens", str(shared / "goldens" / "medium")]) == verify.PASSED
    assert "passed: 3 entries compared" in capsys.readouterr().out


def test_rule() -> None:
    """Scales by kind of parameter; values that bf16 can hold; a tensor depends on its name and the seed."""
    spread = {
        "scale_shift_table": (0.0, 0.3, (6, 512)),
        "attn1.q_norm.weight": (1.5, 0.2, (4096,)),
        "norm1.weight": (1.0, 0.2, (4096,)),
        "norm1.bias": (0.0, 0.1, (4096,)),
        "word_embeddings.weight": (0.0, 1.0, (64, 64)),
        "attn2.wo.weight": (0.0, 3.0 / 16, (32, 256)),
        "emb.timestep_embedder.linear_1.weight": (0.0, 1.4 / 16, (32, 256)),
        "encoder.conv_out.conv.weight": (0.0, 0.7 / 16, (32, 64, 2, 2)),
        "decoder.conv_out.conv.weight": (0.0, 0.6 / 16, (32, 64, 2, 2)),
        "proj_out.weight": (0.0, 1.0 / 16, (32, 256)),
    }
    for key, (mean, deviation, shape) in spread.items():
        weight = weight_for(key, shape, seed=3)
        assert weight.dtype == torch.float32
        assert float(weight.mean()) == pytest.approx(mean, abs=0.1 * deviation)
        assert float(weight.std()) == pytest.approx(deviation, rel=0.1)
        assert torch.equal(weight, weight.bfloat16().float())
        assert torch.equal(weight, weight_for(key, shape, seed=3))
        assert not torch.equal(weight, weight_for(key, shape, seed=4))


def test_made_by_rule_hashes_keys_with_their_prefix() -> None:
    block, sums = made_by_rule(lambda: DiTBlock(128), seed=5, prefix="transformer_blocks.0.")
    key = "transformer_blocks.0.attn1.wo.weight"
    assert torch.equal(block.attn1.wo.weight, weight_for(key, (128, 128), 5))
    assert sums[key] == pytest.approx(float(block.attn1.wo.weight.abs().sum()), rel=1e-5)
    assert not any(parameter.requires_grad for parameter in block.parameters())
