import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from stepvideo_client import MOVEMENTS
from stepvideo_client.fields import INPUTS
from tests import signals
from tests.client.fake_server import (
    JPEG,
    MP4,
    Action,
    FakeServer,
    abort,
    error,
    final,
    hang,
    respond,
    result,
    step,
    wait,
)

Cli = Callable[..., subprocess.CompletedProcess[str]]
NOBODY = "127.0.0.1:1"


def test_generate_writes_the_video_and_the_report(server: FakeServer, cli: Cli, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "V.mp4"
    done = cli("generate", "--url", server.url, "--image", image, "--prompt", "a cat", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == MP4
    report = json.loads((tmp_path / "V.json").read_text())
    assert report["seconds"] == {"total": 1.5}
    assert (report["seed"], report["path"], report["bytes"]) == (7, str(out), len(MP4))
    assert report["wall_seconds"] > 0
    assert "seed 7" in done.stdout
    assert "step 2/2" in done.stderr
    assert server.sent() == {"PROMPT": b"a cat", "IMAGE": image.read_bytes()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["V.json", "V.mp4", "first.png"]


def test_options_reach_the_server(server: FakeServer, cli: Cli, image: Path, tmp_path: Path) -> None:
    options = [
        "--infer-steps",
        "3",
        "--cfg-scale",
        "8.5",
        "--time-shift",
        "13",
        "--motion-score",
        "2",
        "--seed",
        "-5",
        "--num-frames",
        "17",
        "--height",
        "64",
        "--width",
        "96",
        "--timeout",
        "30",
        "--preview-every",
        "2",
        "--negative-prompt",
        "blur",
        "--camera",
        "dolly-in",
        "--header",
        "x-team=a=b",
    ]
    server.script = [step(1, 3), step(2, 3, PREVIEW=JPEG), step(3, 3), result(), final()]
    done = cli(
        *("generate", "--url", server.url, "--image", image, "--prompt", "一只猫。", "--positive-suffix", ""),
        *("--out", tmp_path / "V.mp4", "--json", tmp_path / "report.json", "--preview-dir", tmp_path, *options),
    )
    assert done.returncode == 0, done.stderr
    assert server.sent() == {
        "PROMPT": "一只猫。镜头推进。".encode(),
        "IMAGE": image.read_bytes(),
        "NEGATIVE_PROMPT": b"blur",
        "POSITIVE_SUFFIX": b"",
        "STEPS": 3,
        "CFG_SCALE": 8.5,
        "TIME_SHIFT": 13.0,
        "MOTION_SCORE": 2.0,
        "SEED": -5,
        "NUM_FRAMES": 17,
        "HEIGHT": 64,
        "WIDTH": 96,
        "TIMEOUT_S": 30.0,
        "PREVIEW_EVERY": 2,
    }
    assert server.metadata[0]["x-team"] == "a=b"
    assert (tmp_path / "step_0002.jpg").read_bytes() == JPEG
    assert (tmp_path / "report.json").is_file()


def test_a_preview_is_named_by_what_it_is(server: FakeServer, cli: Cli, image: Path, tmp_path: Path) -> None:
    webp = b"RIFF\0\0\0\0WEBP animation"
    sent = [step(1, 4, PREVIEW=webp), step(2, 4, PREVIEW=JPEG), step(3, 4, PREVIEW=b"new kind"), result(), final()]
    server.script = sent
    options = ("--preview-every", "1", "--preview-format", "webp", "--preview-dir", tmp_path)
    done = cli(
        *("generate", "--url", server.url, "--image", image, "--prompt", "", "--out", tmp_path / "V.mp4", *options)
    )
    assert done.returncode == 0, done.stderr
    assert server.sent()["PREVIEW_FORMAT"] == b"webp"
    names = ("step_0001.webp", "step_0002.jpg", "step_0003.bin")
    assert [(tmp_path / name).read_bytes() for name in names] == [webp, JPEG, b"new kind"]


@pytest.mark.parametrize("kind", ["frames", "latents"])
def test_arrays_are_saved_as_npy(server: FakeServer, cli: Cli, image: Path, tmp_path: Path, kind: str) -> None:
    dtype = np.uint8 if kind == "frames" else np.float32
    array = np.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3).astype(dtype)
    server.script = [result(**{kind.upper(): array}), final()]
    out = tmp_path / "array.npy"
    done = cli(
        *("generate", "--url", server.url, "--image", image, "--prompt", "", "--out", out, "--output", kind, "--quiet")
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    saved = np.load(out)
    assert saved.dtype == dtype
    np.testing.assert_array_equal(saved, array)
    assert server.sent()["OUTPUT"] == kind.encode()


def test_unary(server: FakeServer, cli: Cli, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "V.mp4"
    done = cli("generate", "--unary", "--url", server.url, "--image", image, "--prompt", "a cat", "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == MP4
    assert server.requests[0].model_name == "ti2v_unary"


@pytest.mark.parametrize("how", [(), ("--unary",)])
def test_ctrl_c_cancels_on_the_server(
    server: FakeServer,
    start_cli: Callable[..., subprocess.Popen[str]],
    image: Path,
    tmp_path: Path,
    how: tuple[str, ...],
) -> None:
    server.script = [step(1, 50), hang()]
    server.unary = hang()
    out = tmp_path / "V.mp4"
    process = start_cli("generate", *how, "--url", server.url, "--image", image, "--prompt", "", "--out", out)
    assert server.hanging.wait(30)
    signals.interrupt(process)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert server.cancelled.wait(5)
    assert stderr.splitlines()[-1] == "stepvideo: cancelled."
    assert "Traceback" not in stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        ([error("INTERNAL: Rank 1 died."), final()], 1, "stepvideo: INTERNAL: Rank 1 died."),
        ([error("RESOURCE_EXHAUSTED: 8 wait."), final()], 1, "stepvideo: RESOURCE_EXHAUSTED: 8 wait."),
        ([error("INVALID_ARGUMENT: STEPS is 0."), final()], 2, "stepvideo: INVALID_ARGUMENT: STEPS is 0."),
        ([abort(grpc.StatusCode.UNAUTHENTICATED, "Who?")], 1, "stepvideo: UNAUTHENTICATED: Who?"),
    ],
)
def test_server_errors_are_one_line(
    server: FakeServer, cli: Cli, image: Path, tmp_path: Path, script: list[object], code: int, line: str
) -> None:
    server.script = script  # type: ignore[assignment]
    out = tmp_path / "V.mp4"
    out.write_bytes(b"an earlier video")
    done = cli("generate", "--url", server.url, "--image", image, "--prompt", "", "--out", out)
    assert (done.returncode, done.stderr.splitlines()) == (code, [line])
    assert out.read_bytes() == b"an earlier video"


def test_a_silent_server_is_given_up(server: FakeServer, cli: Cli, image: Path, tmp_path: Path) -> None:
    server.script = [hang()]
    done = cli(
        *("generate", "--url", server.url, "--image", image, "--prompt", "", "--out", tmp_path / "V.mp4"),
        *("--idle-timeout", "0.3"),
    )
    assert done.returncode == 4
    assert done.stderr.startswith(f"stepvideo: UNAVAILABLE: Nothing was received from {server.url} for 0.3 s after ")
    assert "not even a sign of life" in done.stderr


def test_signs_of_life_are_not_silence(server: FakeServer, cli: Cli, image: Path, tmp_path: Path) -> None:
    """A step that takes four times the idle timeout, during which the server repeats what it said last."""
    server.script = [step(3, 50), *[wait(0.3), step(3, 50)] * 8, step(50, 50), result(), final()]
    done = cli(
        *("generate", "--url", server.url, "--image", image, "--prompt", "", "--out", tmp_path / "V.mp4"),
        *("--idle-timeout", "0.6"),
    )
    assert done.returncode == 0, done.stderr


QUOTE = ["SECONDS", "GPU_SECONDS", "PEAK_MEMORY_MIB", "QUEUE_WAIT_S"]
QUOTE_REPORT = {"seconds": {"total": 12.5, "text": 0.5, "denoise": 12.0}, "waiting": 3}


def quoted() -> Action:
    numbers = {name: np.array([12.5 * 2**index], np.float32) for index, name in enumerate(QUOTE)}
    return respond(**numbers, REPORT=json.dumps(QUOTE_REPORT).encode())


def test_quote(server: FakeServer, cli: Cli) -> None:
    server.unary = quoted()
    sizes = ("--num-frames", "34", "--height", "128", "--width", "192", "--infer-steps", "8", "--priority", "1")
    done = cli("quote", "--url", server.url, *sizes, "--cfg-scale", "1", "--prompt-tokens", "99", "--output", "frames")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "12.5 s (text 0.5, denoise 12.0)",
        "25.0 GPU-seconds, 50 MiB on the fullest GPU (predicted)",
        "starts in 100.0 s, 3 waiting",
    ]
    assert server.requests[0].model_name == "ti2v_quote"
    assert server.sent() == {
        "NUM_FRAMES": 34,
        "HEIGHT": 128,
        "WIDTH": 192,
        "STEPS": 8,
        "CFG_SCALE": 1.0,
        "OUTPUT": b"frames",
        "REQUEST_PRIORITY": 1,
        "PROMPT_TOKENS": 99,
    }
    done = cli("quote", "--url", server.url, "--json")
    assert json.loads(done.stdout) == QUOTE_REPORT


DEFAULTS = {"num_frames": 34, "height": 64, "width": 64, "steps": 20, "cfg_scale": 4.0}


def test_the_servers_defaults(server: FakeServer, cli: Cli) -> None:
    server.unary = respond(REPORT=json.dumps({"accepted": 0, "defaults": DEFAULTS}).encode())
    done = cli("defaults", "--url", server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == DEFAULTS
    assert server.requests[0].model_name == "ti2v_unary"
    assert "probe" in server.requests[0].parameters
    server.unary = respond(REPORT=b'{"accepted": 0}')
    done = cli("defaults", "--url", server.url)
    assert done.returncode == 1
    assert "INTERNAL: The server's defaults cannot be read" in done.stderr


def test_prompt_and_image_are_enough(
    server: FakeServer, start_cli: Callable[..., Any], image: Path, tmp_path: Path
) -> None:
    """Nothing else is sent, and the video is named after the image, where the command runs."""
    process = start_cli("generate", "--url", server.url, "--image", image, "--prompt", "a cat", cwd=tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert stdout.startswith("first.mp4: ")
    assert (tmp_path / "first.mp4").read_bytes() == MP4
    assert server.sent() == {"PROMPT": b"a cat", "IMAGE": image.read_bytes()}


def test_every_input_with_a_flag_is_an_option(server: FakeServer, cli: Cli, image: Path, tmp_path: Path) -> None:
    """Each flag of the table reaches its input, in the type of the table."""
    values = {"BYTES": "word", "INT32": "17", "INT64": "18", "FP32": "1.5"}
    flags, expected = ["--image", image], {"IMAGE": image.read_bytes()}
    for option, field in INPUTS.items():
        if field.flag and "generate" in field.commands and option != "image":
            text = field.choices[-1] if field.choices else values[field.datatype]
            flags += [field.flag, text]
            kinds: dict[str, Any] = {"BYTES": str.encode, "FP32": float}
            expected[field.name] = kinds.get(field.datatype, int)(text)
    more = ("--out", tmp_path / "V.npy", "--preview-dir", tmp_path)
    server.script[2] = result(LATENTS=np.zeros((1, 1, 1, 1), np.float32))
    done = cli("generate", "--url", server.url, *flags, *more)
    assert done.returncode == 0, done.stderr
    assert server.sent() == expected


def test_a_quote_that_the_server_cannot_give(server: FakeServer, cli: Cli) -> None:
    server.unary = abort(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE: A quote needs measurements.")
    done = cli("quote", "--url", server.url)
    assert (done.returncode, done.stderr) == (1, "stepvideo: UNAVAILABLE: A quote needs measurements.\n")
    server.unary = respond(SECONDS=np.array([1.0], np.float32))
    assert "INTERNAL: The quote cannot be read" in cli("quote", "--url", server.url).stderr


def test_nobody_there_is_exit_code_3(cli: Cli, image: Path, tmp_path: Path) -> None:
    done = cli("generate", "--url", NOBODY, "--image", image, "--prompt", "", "--out", tmp_path / "V.mp4")
    assert done.returncode == 3
    assert done.stderr.startswith(f"stepvideo: UNAVAILABLE: The server at {NOBODY} cannot be reached")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--out": "missing/V.mp4"}, "--out must be in a folder that exists"),
        ({"--out": "."}, "--out must be a file, and"),
        ({"--out": "V.npy"}, "--out must be a video's name"),
        ({"--output": "frames"}, "--out must be a name ending in .npy"),
        ({"--image": "missing.png"}, "cannot be read: No such file or directory"),
        ({"--json": "missing/report.json"}, "--json must be in a folder that exists"),
        ({"--json": "V.mp4"}, "--json must be another file than --out"),
        ({"--preview-every": "2"}, "--preview-every and --preview-dir go together"),
        ({"--preview-format": "webp"}, "--preview-format goes with --preview-every and --preview-dir"),
        ({"--preview-format": "gif"}, "invalid choice: 'gif'"),
        ({"--preview-every": "2", "--preview-dir": "missing"}, "A preview must be in a folder that exists"),
        ({"--header": "x"}, "--header must be NAME=VALUE"),
        ({"--idle-timeout": "0"}, "idle timeout must be more than 0 seconds"),
        ({"--root-certificates": "missing.pem"}, "PEM file"),
        ({"--camera": "sideways"}, "invalid choice: 'sideways'"),
        ({"--infer-steps": "many"}, "invalid int value: 'many'"),
    ],
)
def test_bad_input_is_refused_before_the_server_is_asked(
    server: FakeServer, cli: Cli, image: Path, tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    paths = ("--out", "--image", "--json", "--preview-dir", "--root-certificates")
    arguments = {"--image": image, "--prompt": "", "--out": tmp_path / "V.mp4"}
    arguments |= {name: tmp_path / value if name in paths else value for name, value in changes.items()}
    done = cli("generate", "--url", server.url, *(word for pair in arguments.items() for word in pair))
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert server.requests == []
    assert [path.name for path in tmp_path.iterdir()] == [image.name]


def test_ready(server: FakeServer, cli: Cli) -> None:
    done = cli("ready", "--url", server.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    server.ready.clear()
    done = cli("ready", "--url", server.url, "--timeout", "0.3")
    assert done.returncode == 3
    assert "is not ready after 0.3 s: the server says that it is not ready" in done.stderr


def test_help_names_the_movements_and_the_exit_codes(cli: Cli) -> None:
    done = cli("generate", "--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in MOVEMENTS)
    assert "130  cancelled" in done.stdout
