"""python -m stepvideo_serve generate: a request in this process, and the trace of one of its steps."""

import io
import json
import os
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stepvideo_serve.__main__ import main
from stepvideo_serve.assembly.stages import LocalStages
from stepvideo_serve.assembly.step_profile import profiled
from stepvideo_serve.assembly.step_progress import StepProgress
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.pipeline.generate import Progress, Result, generate
from stepvideo_serve.request import parse_request
from stepvideo_serve.sampling.job import StepDone
from tests.mini import bytes_of
from tests.serving.launch import EAGER
from tests.signals import interrupt, start
from tests.video.decode import decode_mp4

DEFAULTS = "\n[defaults]\nnum_frames = 17\nheight = 64\nwidth = 96\nsteps = 3\n\n[card]\ncfg_scale = [4.0, 4.0]\n"
SEED = 7
PROMPT = "一只猫"


@pytest.fixture(scope="module")
def config(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "serve.toml"
    # A layout of a server: this process is alone all the same.
    path.write_text(EAGER.format(model=mini_checkpoint, layout="cfg2") + DEFAULTS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "first.png"
    values = np.random.default_rng(3).integers(0, 255, (64, 96, 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def command(config: Path, picture: Path, tmp_path: Path) -> list[str]:
    given = {"--config": config, "--image": picture, "--prompt": PROMPT, "--out": tmp_path / "v.mp4", "--seed": SEED}
    return ["generate", *(str(word) for pair in given.items() for word in pair)]


def result_of(config: Path, picture: Path) -> Result:
    """What the pipeline gives for the same request."""
    loaded = ServeConfig.load(config)
    inputs: dict[str, Any] = {
        "PROMPT": bytes_of(PROMPT.encode()),
        "IMAGE": bytes_of(picture.read_bytes()),
        "SEED": np.array([SEED], np.int64),
    }
    stages = LocalStages(loaded)
    request = parse_request(inputs, loaded.limits, stages.latent_channels, loaded.defaults)
    *_, last = generate(request, stages, loaded.video, lambda: False, loaded.gates)
    assert isinstance(last, Result)
    return last


def names_in(trace: Path) -> "Counter[str]":
    """How often each range and operation is in a trace."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") in ("user_annotation", "cpu_op"))


def test_the_video_is_that_of_the_pipeline_and_the_trace_holds_one_step(
    command: list[str], config: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "step.json"
    assert main([*command, "--json", str(tmp_path / "report.json"), "--profile", str(trace)]) == 0
    said = capsys.readouterr()
    expected = result_of(config, picture)
    video = (tmp_path / "v.mp4").read_bytes()
    assert video == expected.video
    assert decode_mp4(video)[0].shape == (17, 64, 96, 3)

    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["seed"], report["bytes"], report["layout"]) == (SEED, len(video), "single")
    assert [warning["gate"] for warning in report["warnings"]] == ["card"]
    assert "warning: The card of this checkpoint states a CFG_SCALE of 4, got 9" in said.err
    assert "step 2/3" in said.err
    assert "left" in said.err
    assert f"{trace}: a trace of step 2 of 3\n" in said.out

    names = names_in(trace)
    layers, branches = 2, 2
    assert (names["denoise step"], names["dit_embed"], names["dit_final"]) == (1, 1, branches)
    assert [names[f"dit_block_{i:02d}"] for i in range(layers)] == [branches] * layers
    assert not [name for name in names if name.startswith(("dit_context", "dit_cross", "vae", "step_llm"))]
    # Self- and cross-attention of each block, and nothing of the text encoders or the VAE.
    assert names["aten::scaled_dot_product_attention"] == 2 * layers * branches
    assert names["aten::conv3d"] == 0


def test_arrays_and_previews(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "frames.npy"
    options = ["--out", str(out), "--output", "frames", "--preview-every", "1", "--preview-dir", str(tmp_path)]
    assert main([*command, *options]) == 0
    frames = np.load(out)
    assert (frames.shape, frames.dtype) == ((17, 64, 96, 3), np.uint8)
    previews = sorted(path.name for path in tmp_path.glob("*.jpg"))
    assert previews == ["step_0001.jpg", "step_0002.jpg"], "the last step has the video"
    with Image.open(tmp_path / previews[0]) as preview:
        assert preview.format == "JPEG"
    assert main([*command, *options, "--preview-format", "webp"]) == 0
    with Image.open(tmp_path / "step_0001.webp") as animation:
        assert (animation.format, getattr(animation, "n_frames", 1)) == ("WEBP", 3)


def test_what_is_no_regular_file_is_written_to_and_links_are_followed(
    command: list[str], config: Path, picture: Path, tmp_path: Path
) -> None:
    pipe, real, link = tmp_path / "pipe", tmp_path / "real.mp4", tmp_path / "link.mp4"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert main([*command, "--out", str(pipe)]) == 0
    received = os.read(reader, 1 << 20)
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert received == result_of(config, picture).video

    real.write_bytes(b"old")
    link.symlink_to(real)
    assert main([*command, "--out", str(link)]) == 0
    assert link.is_symlink()
    assert real.read_bytes() == received


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--image", "none.png"], "--image must be a file that can be read, got none.png: No such file"),
        (["--image", "."], "--image must be a file that can be read, got .: Is a directory"),
        (["--image", os.devnull], "IMAGE must "),
        (["--image", __file__], "IMAGE must be "),
        (["--seed", "4294967296"], "SEED must be from 0 to 4294967295, got 4294967296"),
        (["--num-frames", "99999999999"], "NUM_FRAMES must "),
        (["--cfg-scale", "nan"], "CFG_SCALE must be a finite number, got nan"),
        (["--cfg-scale", "1e300"], "CFG_SCALE must be a finite number, got inf"),
        (["--prompt", "\udcff"], "PROMPT must be UTF-8"),
        (["--prompt", "word " * 400], "at most 320 tokens"),
        (["--timeout", "0.001"], "TIMEOUT_S = 0.001, which ran out"),
        (["--config", "none.toml"], "none.toml"),
        (["--out", "none/v.mp4"], "--out must be in a folder that exists, got none/v.mp4"),
        (["--out", "."], "--out must be a file, got the folder ."),
        (["--out", "v.webm"], "--out must end in .mp4 for --output mp4, got v.webm"),
        (["--output", "latents"], "--out must end in .npy for --output latents"),
        (["--preview-every", "1"], "--preview-every and --preview-dir go together"),
        (["--preview-format", "webp"], "--preview-format goes with --preview-every and --preview-dir"),
        (["--profile", "none/t.json"], "--profile must be in a folder that exists"),
        (["--profile", "t.json", "--json", "t.json"], "must be different files"),
        (["--quality", "best"], "exact, balanced, fast"),
        (["--draft-first"], "--draft-first needs a terminal to ask whether to go on, got none: add --yes"),
        (["--draft-first", "best", "--yes"], "exact, balanced, fast"),
        (["--draft-first", "--yes", "--profile", "t.json"], "--profile traces one generation"),
        (["--draft-first", "--yes", "--out", os.devnull], "--draft-first writes a file beside --out"),
        (["--profile", "t.json", "--infer-steps", "1"], "--profile needs --infer-steps of at least 2, got 1"),
    ],
)
def test_bad_input_is_one_sentence(
    command: list[str],
    options: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, *options]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loaded in")]
    assert line.startswith("error: ")
    assert sentence in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--steps", "3"], ["--seed", "seven"], ["--output", "gif"], ["--out"]])
def test_wrong_usage(command: list[str], options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, *options])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_options_are_the_clients() -> None:
    from stepvideo_client.fields import INPUTS

    done = subprocess.run(
        [sys.executable, "-m", "stepvideo_serve", "generate", "--help"], capture_output=True, text=True, check=True
    )
    flags = {field.flag for field in INPUTS.values() if field.flag and "generate" in field.commands}
    assert flags
    assert not [flag for flag in flags if f" {flag} " not in done.stdout]


def test_ctrl_c(command: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "stepvideo_serve", *command, "--infer-steps", "200"]
    with start(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stderr is not None
        while not child.stderr.readline().startswith("step 1/"):
            assert child.poll() is None
        interrupt(child)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.splitlines()[-1] == "error: cancelled."
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_forecast_is_not_the_profiled_one(tmp_path: Path) -> None:
    def steps() -> Any:
        for step, evaluated in enumerate((True, False, True, True), start=1):
            torch.ones(step).sigmoid()
            yield StepDone(step, 4, 0.0, None, None, evaluated)

    trace, noted = tmp_path / "t.json", list[int]()
    assert [done.step for done in profiled(steps(), trace, noted.append) if isinstance(done, StepDone)] == [1, 2, 3, 4]
    assert noted == [3]
    assert names_in(trace)["aten::sigmoid"] == 1


class Terminal(io.StringIO):
    """Someone who types."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("typed", ["n\n", "y\n"])
def test_a_draft_first(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    out, draft = tmp_path / "v.npy", tmp_path / "v.draft.npy"
    options = ["--output", "latents", "--infer-steps", "20", "--out", str(out)]
    mask = "mask:1" + "01" * 9 + "1"
    assert main([*command, *options, "--draft-first", mask]) == 0
    said = capsys.readouterr()
    assert f"{draft}: a draft, 11 of 20 steps evaluated" in said.out
    assert "Make it in full, with the same seed? [y/N]" in said.err
    assert out.exists() == (typed == "y\n")
    if out.exists():
        rough, whole = np.load(draft), np.load(out)
        assert not np.array_equal(rough, whole)
        for quality, made in ((mask, rough), ("exact", whole)):
            assert main([*command, *options, "--quality", quality]) == 0
            np.testing.assert_array_equal(np.load(out), made)
    else:
        assert f"--seed {SEED} makes the same one again" in said.err


def test_progress_on_a_terminal() -> None:
    terminal = Terminal()
    progress = StepProgress(terminal)
    for step in (1, 2, 3):
        progress.show(Progress(step, 3, 10.0 + 65.0 * step, None))
    progress.close()
    lines = terminal.getvalue().split("\r\x1b[K")[1:]
    assert lines == ["step 1/3", "step 2/3  65.00 s/step  1:05 left", "step 3/3  decoding the video\n"]
