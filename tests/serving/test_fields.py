"""The table of fields: what `make fields` writes from it, what the server fills in, and a new input's whole way."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepvideo_client import Client
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.request import CheckpointCard, RequestLimits, card_warnings, parse_request
from stepvideo_serve.serving import field_files
from tests.serving.calls import Refused, Server, Values, report_of

TABLE = "stepvideo_serve/request/fields.py"
REQUEST = "stepvideo_serve/request/parse.py"
MOST_HANDWRITTEN = 4
# An imaginary sampling input: file -> what is put before which line. What uses its value is not there.
WOBBLE: Mapping[str, tuple[str, str]] = {
    TABLE: (
        '    Field(\n        "SEED",\n',
        '    Field(\n        "WOBBLE",\n        "wobble",\n        "FP32",\n        0.5,\n'
        '        Range(lambda _: (0.25, 2.5)),\n        ("request", "ranks", "client"),\n'
        '        "how much it wobbles",\n        metavar="X",\n    ),\n',
    ),
    REQUEST: ("    seed: int\n", "    wobble: float\n"),
}


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A copy of what the table of fields is about, and of the package."""
    top = tmp_path / "checkout"
    for name in ("stepvideo_serve", "client", "model_repository"):
        shutil.copytree(root / name, top / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (top / "docs").mkdir()
    shutil.copy(root / field_files.DOCUMENT, top / "docs")
    return top


def python_in(top: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs Python on the copy's modules."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(top), str(top / "client")))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=top, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_what_is_committed_follows_from_the_table(root: Path) -> None:
    assert field_files.main(["--root", str(root), "--check"]) == 0


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("model_repository/ti2v/config.pbtxt", '"STEPS" data_type: TYPE_INT32', '"STEPS" data_type: TYPE_INT64'),
        ("model_repository/ti2v_quote/config.pbtxt", '  { name: "WIDTH" data_type: TYPE_INT32 ', "  { "),
        ("client/stepvideo_client/fields.py", "--infer-steps", "--steps"),
        ("docs/requests.md", "from 1 to 200", "from 1 to 100"),
    ],
)
def test_a_stale_file_is_one_sentence(
    checkout: Path, name: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkout / name
    committed = path.read_text(encoding="utf-8")
    assert old in committed
    path.write_text(committed.replace(old, new, 1), encoding="utf-8")
    options = ["--root", str(checkout)]
    assert field_files.main([*options, "--check"]) == 1
    said = capsys.readouterr().err
    assert said == f"{path} must be as {TABLE} says, and is not: run make fields.\n"
    assert field_files.main(options) == 0
    assert path.read_text(encoding="utf-8") == committed
    assert field_files.main([*options, "--check"]) == 0


def test_a_file_without_a_place_for_the_inputs_is_named(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkout / "docs/requests.md"
    path.write_text("# Requests\n", encoding="utf-8")
    assert field_files.main(["--root", str(checkout)]) == 1
    assert capsys.readouterr().err.startswith(f"{path} must have a place for what {TABLE} says: <!-- fields: ")


def test_generated_files_say_so_first(root: Path) -> None:
    first = (root / field_files.CLIENT_FILE).read_text(encoding="utf-8").splitlines()[0]
    assert field_files.WRITTEN in first
    for model in ("ti2v", "ti2v_unary", "ti2v_quote"):
        text = (root / f"model_repository/{model}/config.pbtxt").read_text(encoding="utf-8")
        assert f"\ninput [  # {field_files.WRITTEN}\n" in text


def test_prompt_and_image_are_enough(server: Server, config: ServeConfig, picture: bytes) -> None:
    """The server fills in the rest, and says how in its REPORT, to a probe, and with a quote."""
    plain = {"PROMPT": b"a cat", "IMAGE": picture, "OUTPUT": b"mp4"}
    report = report_of(server.stream(plain).result)
    filled = asdict(config.defaults)
    shown = {"num_frames": "frames", "height": "height", "width": "width", "steps": "steps"}
    assert {name: report[key] for name, key in shown.items()} == {name: filled[name] for name in shown}
    assert filled["steps"] == 2, "those of serve.toml, not the official ones"
    with Client(server.grpc_url) as client:
        assert client.defaults() == filled
        assert client.quote().report["defaults"] == filled
        quoted, explicit = (client.quote(**options) for options in ({}, {name: filled[name] for name in shown}))
    assert quoted.report == explicit.report


def test_what_the_card_does_not_state_is_a_warning(server: Server, small: Values) -> None:
    def warnings(scale: float) -> list[dict[str, str]]:
        answer = server.grpc({**small, "CFG_SCALE": np.array([scale], np.float32)})
        return [warning for warning in report_of(answer)["warnings"] if warning["gate"] == "card"]

    assert warnings(9.0) == []
    [warning] = warnings(9.5)
    assert "states a CFG_SCALE of 1 to 9, got 9.5" in warning["message"]


def test_a_seed_that_would_wrap_is_refused(server: Server, small: Values) -> None:
    for send in (server.stream, server.grpc, server.http):
        with pytest.raises(Refused, match="INVALID_ARGUMENT: SEED must be from 0 to 4294967295, got 4294967296"):
            send({**small, "SEED": np.array([2**32], np.int64)})


def test_sizes_and_guidance_of_the_card() -> None:
    values = {"NUM_FRAMES": 34, "HEIGHT": 64, "WIDTH": 96}
    inputs: dict[str, Any] = {name: np.array([value], np.int32) for name, value in values.items()}
    inputs |= {name: np.array([b"x"], np.object_) for name in ("PROMPT", "IMAGE")}
    request = parse_request({**inputs, "CFG_SCALE": np.array([4.1], np.float32)}, RequestLimits(), 4)
    assert card_warnings(request, CheckpointCard()) == []
    stated = CheckpointCard(((17, 64, 96), (34, 64, 96)), (4.1, 9.0))
    assert card_warnings(request, stated) == []
    [sentence] = card_warnings(request, replace(stated, sizes=((17, 64, 96), (34, 64, 64))))
    assert "states 17 frames of 64x96 or 34 frames of 64x64, got 34 frames of 64x96" in sentence
    [sentence] = card_warnings(request, replace(stated, cfg_scale=(4.0, 4.0)))
    assert "states a CFG_SCALE of 4, got 4.1" in sentence


def test_a_new_input_goes_the_whole_way(checkout: Path, config: ServeConfig, picture: bytes, tmp_path: Path) -> None:
    """Two hand-written files, `make fields`, and the input is an option of the client, an input of the server, and a
    setting that the rank was given."""
    assert len(WOBBLE) <= MOST_HANDWRITTEN
    for name, (before, added) in WOBBLE.items():
        text = (checkout / name).read_text(encoding="utf-8")
        assert text.count(before) == 1
        (checkout / name).write_text(text.replace(before, added + before), encoding="utf-8")
    made = python_in(checkout, "-m", "stepvideo_serve.serving.field_files")
    assert (made.returncode, len(made.stdout.splitlines())) == (0, 4), made.stderr

    image, toml, report = (tmp_path / name for name in ("first.png", "serve.toml", "report.json"))
    image.write_bytes(picture)
    model = f'[model]\ndir = "{config.model.dir}"\nengines_dir = "{config.model.engines_dir}"\n'
    toml.write_text(f"{model}[defaults]\nnum_frames = 17\nheight = 64\nwidth = 96\nsteps = 2\n", encoding="utf-8")
    client = (
        f"{sys.executable} -m stepvideo_client generate --url $STEPVIDEO_GRPC_URL --image {image} --prompt 'a cat' "
        f"--out {tmp_path}/V.npy --output latents --quiet"
    )
    script = f"{client} --wobble 1.25 --json {report} && ! {client} --wobble 2.75 >&2"
    served = ("-m", "stepvideo_serve", "run", "--config", str(toml), "--log", str(tmp_path / "server.log"), "--")
    done = python_in(checkout, *served, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert "INVALID_ARGUMENT: WOBBLE must be from 0.25 to 2.5, got 2.75" in done.stderr
    assert json.loads(report.read_text(encoding="utf-8"))["settings"]["wobble"] == 1.25
