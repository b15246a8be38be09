"""Calibration: what is measured is what the layers get; interrupted runs go on; one sentence for what is wrong."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

from export.calibrate import main
from export.compare.graph_stages import read_requests
from export.quantize.calibration import Calibration
from export.quantize.forecast import forecast_s, in_words, matmul_rate
from export.tiny_checkpoint import write_checkpoint
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.errors import ExportError
from stepvideo_serve.fused.layers import all_names
from stepvideo_serve.pipeline.generate import generate
from stepvideo_serve.request import GenerationRequest
from tests.mini import MINI

OPTIONS = ("--steps", "2", "--num-frames", "17", "--height", "32", "--width", "48", "--threads", "1", "--quiet")


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs, one of them in a folder."""
    folder = tmp_path_factory.mktemp("requests")
    (folder / "V").mkdir()
    for name, colour in (("cat", (200, 30, 30)), ("V/dog", (20, 90, 200))):
        Image.new("RGB", (60, 40), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"一只{colour[0]}在窗台上。", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def calibrated(mini_checkpoint: Path, requests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "calibration.json"
    assert run(mini_checkpoint, requests, out) == 0
    return out


def run(model: Path, requests: Path, out: Path, *options: str) -> int:
    return main(["--model-dir", str(model), "--requests", str(requests), "--out", str(out), *OPTIONS, *options])


def test_every_layer_has_a_range(calibrated: Path, mini_checkpoint: Path) -> None:
    names = all_names(MINI.dit, MINI.llm)
    expected = {name for name in names if not name.endswith("core")}
    expected |= {f"{name}.{operand}" for name in names if name.endswith("core") for operand in "qkv"}
    calibration = Calibration.load(calibrated)
    assert set(calibration.amax) == expected
    assert all(value > 0 for value in calibration.amax.values())
    assert set(calibration.settings["requests"]) == {"cat", "V/dog"}
    calibration.require(Checkpoint(mini_checkpoint))
    assert not list(calibrated.parent.glob(".*.partial"))


def test_what_it_will_take_is_said_before_it_begins(
    mini_checkpoint: Path, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(mini_checkpoint, requests, tmp_path / "out.json", "--limit", "1") == 0
    first, *_ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"calibrate: 1 requests of 17 frames of 32x48, 2 steps together, in fp32 on cpu: about [\d.]+ (s|min|h) once "
        "the weights are loaded; less with --limit, --steps, --num-frames, --height, --width",
        first,
    )


def test_the_forecast_grows_with_the_work(mini_checkpoint: Path, requests: Path) -> None:
    checkpoint, channels = Checkpoint(mini_checkpoint), MINI.dit.in_channels

    def asked(**options: int) -> list[GenerationRequest]:
        sizes = {"num_frames": 17, "height": 32, "width": 48, "steps": 2}
        return list(read_requests(requests, None, channels, **{**sizes, **options}).values())

    def seconds(chosen: list[GenerationRequest]) -> float:
        """At a given rate: that of this machine changes while it is asked."""
        with patch("export.quantize.forecast.matmul_rate", lambda *_: 1e9):
            return forecast_s(checkpoint, chosen, "fp32", "cpu")

    few = asked()
    assert seconds(few) > seconds(few[:1]) > 0
    assert seconds(asked(steps=8)) > 1.5 * seconds(few)
    assert seconds(asked(height=128, width=192)) > 4 * seconds(few)
    assert matmul_rate("fp32", "cpu") > 1e6


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.01, "1 s"),
        (40.2, "40 s"),
        (89, "89 s"),
        (150, "2.5 min"),
        (5000, "83 min"),
        (9000, "2.5 h"),
        (500_000, "139 h"),
    ],
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_keys_are_no_longer_than_their_norm_allows(calibrated: Path, mini_checkpoint: Path) -> None:
    """RMS norm leaves at most sqrt(128) times the gain in one channel, and rotation sqrt(2) times that."""
    block = Checkpoint(mini_checkpoint).dit_block(0)
    amax = Calibration.load(calibrated).amax["transformer_blocks.0.attn1.core.k"]
    gain = float(block.attn1.k_norm.weight.abs().max())
    assert gain < amax <= gain * 256**0.5


def test_the_file_is_that_of_an_uninterrupted_run(
    calibrated: Path, mini_checkpoint: Path, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "again.json"
    monkeypatch.setattr("export.quantize.measure.generate", _stop_at_second(generate))
    assert run(mini_checkpoint, requests, out) == 130
    assert not out.exists()
    partial = json.loads((tmp_path / ".again.json.partial").read_text())
    assert partial["done"] == ["texts", "V/dog"]

    seen: list[int] = []

    def counted(*given: object) -> object:
        seen.append(1)
        return generate(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("export.quantize.measure.generate", counted)
    assert run(mini_checkpoint, requests, out) == 0
    assert len(seen) == 1
    assert json.loads(out.read_text()) == json.loads(calibrated.read_text())


def _stop_at_second(generate: Callable[..., object]) -> Callable[..., object]:
    calls: list[int] = []

    def stopping(*given: object) -> object:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return generate(*given)

    return stopping


def test_a_percentile_gives_narrower_ranges(
    calibrated: Path, mini_checkpoint: Path, requests: Path, tmp_path: Path
) -> None:
    assert run(mini_checkpoint, requests, tmp_path / "p.json", "--percentile", "99", "--limit", "2") == 0
    narrow, wide = Calibration.load(tmp_path / "p.json").amax, Calibration.load(calibrated).amax
    assert all(narrow[name] <= wide[name] for name in wide)
    assert sum(narrow.values()) < 0.8 * sum(wide.values())


def test_another_checkpoint_is_refused(calibrated: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, MINI, seed=9)
    with pytest.raises(ExportError, match=r"must be of .* run python -m export.calibrate again"):
        Calibration.load(calibrated).require(Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "must be a file of python -m export.calibrate"),
        ("{", "must be JSON"),
        ('{"format_version": 9}', "format_version 1, found 9"),
        ('{"format_version": 1}', "must have the form of a calibration"),
        (
            '{"format_version": 1, "checkpoint": {"dit": "a", "llm": "b", "tokenizers": "c"}, "settings": {}, '
            '"amax": {"x": -1}}',
            "finite magnitudes, found -1.0 for x",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence(text: str | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ExportError, match=expected):
        Calibration.load(path)


def test_wrong_requests_are_one_sentence(
    mini_checkpoint: Path, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    alone = tmp_path / "alone"
    shutil.copytree(requests, alone)
    (alone / "cat.txt").unlink()
    out = tmp_path / "out.json"
    for folder, options, expected in (
        (tmp_path / "nowhere", (), "found no folder"),
        (tmp_path / "empty", (), "found no image"),
        (alone, (), "needs its prompt beside it in cat.txt"),
        (requests, ("--width", "50"), "WIDTH"),
        (requests, ("--limit", "0"), "--limit must be at least 1"),
        (requests, ("--percentile", "0"), "--percentile must be above 0"),
    ):
        assert run(mini_checkpoint, folder, out, *options) == 2
        message = capsys.readouterr().err
        assert expected in message
        assert message.count("\n") == 1
    assert not out.exists()


def test_a_damaged_rest_of_an_interrupted_run_is_one_sentence(
    mini_checkpoint: Path, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".out.json.partial").write_text('{"key": ')
    assert run(mini_checkpoint, requests, tmp_path / "out.json") == 2
    message = capsys.readouterr().err
    forecast, error = message.splitlines()
    assert forecast.startswith("calibrate: 2 requests of 17 frames")
    assert "must be the rest of an interrupted run" in error


def test_requests_differ_in_seed_and_keep_the_options(requests: Path) -> None:
    found = read_requests(requests, None, 4, steps=3, num_frames=34, cfg_scale=1.0)
    assert [request.seed for request in found.values()] == [0, 1]
    assert {(request.steps, request.num_frames, request.cfg_scale) for request in found.values()} == {(3, 34, 1.0)}
