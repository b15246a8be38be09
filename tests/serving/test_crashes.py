"""Processes that die, and callers of the internal models that send nonsense: the server goes on."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from stepvideo_serve.launch.leftovers import SHARED_MEMORY
from tests.mini import job_settings
from tests.server_deaths import WatchServer
from tests.serving.calls import Refused, Server, Values
from tests.serving.launch import serving

SOON_S = 60.0
STATES = {"positive_llm": np.zeros((3, 96), np.float32), "positive_clip": np.zeros((77, 64), np.float32)}


def settings(**changes: object) -> bytes:
    """What `ti2v` sends of a request with one step and no guidance, with changes."""
    return json.dumps({**job_settings(1, cfg_scale=1.0), **changes}).encode()


RUN: Values = {
    "RUN_ID": b"r",
    "latents": np.zeros((3, 8, 2, 2), np.float32),
    "condition": np.zeros((8, 2, 2), np.float32),
    **STATES,
    "SETTINGS": settings(),
}
NAN = np.full((3, 8, 2, 2), np.nan, np.float32)

# Runs that are refused, or fail: what is wrong, and the words of the answer.
MALFORMED: dict[str, tuple[str, Values, str]] = {
    "nothing": ("dit_denoiser", {}, "INVALID_ARGUMENT: A run needs RUN_ID"),
    "no-run-id": ("dit_denoiser", {"SETTINGS": settings()}, "INVALID_ARGUMENT: A run needs RUN_ID"),
    "run-id-only": ("dit_denoiser", {"RUN_ID": b"r"}, "INVALID_ARGUMENT: A run needs SETTINGS"),
    "run-id-not-utf8": ("dit_denoiser", {"RUN_ID": b"\xff"}, "INVALID_ARGUMENT: A run needs SETTINGS"),
    "no-tensors": (
        "dit_denoiser",
        {name: value for name, value in RUN.items() if name not in STATES},
        "INVALID_ARGUMENT: A run needs positive_llm",
    ),
    "latents-nan": ("dit_denoiser", {**RUN, "latents": NAN}, "INVALID_ARGUMENT: latents must be a finite tensor"),
    "latents-of-another-size": (
        "dit_denoiser",
        {**RUN, "latents": np.zeros((3, 8, 2, 3), np.float32)},
        "INVALID_ARGUMENT: condition must be one frame of latents",
    ),
    "channels": (
        "dit_denoiser",
        {**RUN, "latents": np.zeros((3, 5, 2, 2), np.float32), "condition": np.zeros((5, 2, 2), np.float32)},
        "INVALID_ARGUMENT: The tensors must fit the graphs",
    ),
    "text-width": (
        "dit_denoiser",
        {**RUN, "positive_llm": np.zeros((3, 7), np.float32)},
        "INVALID_ARGUMENT: The tensors must fit the graphs",
    ),
    "no-steps": ("dit_denoiser", {**RUN, "SETTINGS": settings(steps=0)}, "INVALID_ARGUMENT: steps must be from 1 to"),
    "scale-nan": (
        "dit_denoiser",
        {**RUN, "SETTINGS": settings(cfg_scale=float("nan"))},
        "INVALID_ARGUMENT: cfg_scale must be",
    ),
    "settings-no-json": ("dit_denoiser", {**RUN, "SETTINGS": b"{"}, "INVALID_ARGUMENT: SETTINGS must be a JSON"),
    "settings-no-object": ("dit_denoiser", {**RUN, "SETTINGS": b"[1]"}, "INVALID_ARGUMENT: SETTINGS must be a JSON"),
    "settings-unknown": ("dit_denoiser", {**RUN, "SETTINGS": settings(more=1)}, "INVALID_ARGUMENT: Settings must be"),
    "no-time": ("dit_denoiser", {**RUN, "TIMEOUT_S": np.array([-1], np.float32)}, "DEADLINE_EXCEEDED: "),
    "decode-nothing": ("vae_decoder", {"RUN_ID": b"r"}, "INVALID_ARGUMENT: A run needs latents"),
    "decode-no-run-id": ("vae_decoder", {"latents": RUN["latents"]}, "INVALID_ARGUMENT: A run needs RUN_ID"),
    "decode-nan": ("vae_decoder", {"RUN_ID": b"r", "latents": NAN}, "INVALID_ARGUMENT: latents must be a finite"),
    "decode-channels": ("vae_decoder", {"RUN_ID": b"r", "latents": np.zeros((3, 5, 2, 2), np.float32)}, "INTERNAL: "),
    "decode-more-channels": (
        "vae_decoder",
        {"RUN_ID": b"r", "latents": np.zeros((3, 9, 2, 2), np.float32)},
        "INVALID_ARGUMENT: latents must have at most 8 channels, got 9",
    ),
    "decode-no-frames": (
        "vae_decoder",
        {"RUN_ID": b"r", "latents": np.zeros((0, 8, 2, 2), np.float32)},
        "INVALID_ARGUMENT: latents must be a finite tensor, got no values",
    ),
    "text-length": (
        "dit_denoiser",
        {**RUN, "positive_llm": np.zeros((321, 96), np.float32)},
        "INVALID_ARGUMENT: positive_llm must be from 1x1 to 320x96, got 321x96",
    ),
    "text-infinite": (
        "dit_denoiser",
        {**RUN, "positive_clip": np.full((77, 64), np.inf, np.float32)},
        "INVALID_ARGUMENT: positive_clip must hold finite values",
    ),
    "too-many-ids": (
        "dit_denoiser",
        {"RUN_ID": b"r", "KIND": b"text", "input_ids": np.ones((1, 321), np.int64)},
        "INVALID_ARGUMENT: input_ids must be one row of 1 to 320 tokens, got 1x321",
    ),
    "ids-below-the-vocabulary": (
        "dit_denoiser",
        {"RUN_ID": b"r", "KIND": b"text", "input_ids": np.full((1, 3), -1, np.int64)},
        "INVALID_ARGUMENT: input_ids must be from 0 to",
    ),
}
PIXELS = np.zeros((3, 32, 32), np.float32)
NOISE = np.zeros((8, 2, 2), np.float32)
# The same for the models that answer once.
MALFORMED_UNARY: dict[str, tuple[str, Values, str]] = {
    "text-not-utf8": ("text_encoder", {"PROMPT": b"\xff"}, "INVALID_ARGUMENT: PROMPT must be UTF-8"),
    "text-overlong": ("text_encoder", {"PROMPT": "猫 跳 ".encode() * 200}, "INVALID_ARGUMENT: .* at most 320 tokens"),
    "pixels-nan": ("vae_encoder", {"PIXELS": PIXELS * np.nan, "NOISE": NOISE}, "INVALID_ARGUMENT: PIXELS and NOISE"),
    "pixels-off-grid": ("vae_encoder", {"PIXELS": PIXELS[:, :30], "NOISE": NOISE}, "(INTERNAL|INVALID_ARGUMENT): "),
    "noise-nan": ("vae_encoder", {"PIXELS": PIXELS, "NOISE": NOISE * np.nan}, "INVALID_ARGUMENT: NOISE must be"),
    "noise-of-another-size": ("vae_encoder", {"PIXELS": PIXELS, "NOISE": NOISE[:, :1]}, "INVALID_ARGUMENT: NOISE"),
}


@pytest.fixture(autouse=True, scope="module")
def server_goes_on(server: Server, small: Values) -> Iterator[None]:
    """After all of this the same request has the same answer."""
    before = server.grpc(small)["LATENTS"]
    yield
    for after in (server.stream_result(small), server.grpc(small)):
        np.testing.assert_array_equal(after["LATENTS"], before)


def test_the_run_that_the_malformed_calls_are_made_from_is_answered(server: Server) -> None:
    *steps, result = server.run(RUN, "dit_denoiser")
    assert [step["STEP"][0] for step in steps] == [1]
    assert result.keys() == {"latents", "REPORT"}
    assert json.loads(result["REPORT"].item())["settings"] == json.loads(settings())


@pytest.mark.parametrize(("model", "values", "words"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_run_is_answered_with_an_error(server: Server, model: str, values: Values, words: str) -> None:
    with pytest.raises(Refused) as caught:
        server.run(values, model)
    assert caught.value.text.startswith(words)
    assert "Traceback" not in caught.value.text


@pytest.mark.parametrize(("model", "values", "words"), MALFORMED_UNARY.values(), ids=MALFORMED_UNARY.keys())
def test_a_malformed_call_is_answered_with_an_error(server: Server, model: str, values: Values, words: str) -> None:
    with pytest.raises(Refused, match=f"^[A-Z_]+: {words}"):
        server.grpc(values, model)


def test_two_runs_of_one_name_do_not_meet(server: Server, long: Values) -> None:
    with server.open(long) as running:
        running.wait_for_step(1)
        server.grpc(RUN, "dit_denoiser")
        with pytest.raises(Refused, match="INVALID_ARGUMENT: RUN_ID must be new"):
            server.grpc(RUN, "dit_denoiser")
        server.grpc({"CANCEL_RUN": RUN["RUN_ID"]}, "dit_denoiser")
        with pytest.raises(Refused, match="CANCELLED: "):
            server.run_on(RUN["RUN_ID"], "dit_denoiser")


def kill_rank(server: Server) -> psutil.Process:
    rank = server.rank()
    rank.send_signal(signal.SIGKILL)
    return rank


def test_a_run_outlives_its_rank(server: Server, small: Values) -> None:
    steps: Values = {**small, "STEPS": np.array([40], np.int32)}
    undisturbed = server.stream(steps)
    with server.open(steps) as stream:
        stream.wait_for_step(3)
        kill_rank(server)
        answer = stream.collect()
    assert [int(step["STEP"][0]) for step in answer.progress] == list(range(4, 41))
    np.testing.assert_array_equal(answer.result["LATENTS"], undisturbed.result["LATENTS"])


def test_a_run_whose_ranks_die_again_and_again_fails_and_the_next_one_does_not(
    server: Server, long: Values, small: Values
) -> None:
    with server.open(long) as stream:
        stream.wait_for_step(1)
        kill_rank(server)  # the run may go on once
        stream.wait_for_step(int(stream.next()[0]["STEP"][0]) + 2)
        kill_rank(server)
        began_s = time.monotonic()
        with pytest.raises(Refused) as caught:
            stream.collect()
        assert time.monotonic() - began_s < SOON_S
    refused = caught.value
    assert refused.text.startswith("INTERNAL: The ranks failed 2 times during the request")
    assert "SIGKILL" in refused.text
    assert server.stream_result(small)["SEED"] == [7]


def test_a_rank_that_dies_between_requests_is_replaced(server: Server, small: Values) -> None:
    old = kill_rank(server)
    assert server.grpc(small)["SEED"] == [7]
    assert server.rank().pid != old.pid


@pytest.mark.slow
def test_a_killed_launcher_leaves_nothing_and_the_next_start_works(
    root: Path, config_text: str, small: Values, tmp_path: Path, watch: WatchServer
) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(config_text, encoding="utf-8")
    launch = [sys.executable, "-m", "stepvideo_serve", "run", f"--config={config}"]
    launch += [f"--log={tmp_path / 'server.log'}", "--", sys.executable, "-c"]
    launch += ["import sys; print('up', flush=True); sys.stdin.read()"]
    with subprocess.Popen(launch, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"up\n"
        processes = psutil.Process(launcher.pid).children(recursive=True)
        assert sum("triton_python_backend_stub" in process.name() for process in processes) >= 1
        launcher.kill()
    assert not psutil.wait_procs(processes, timeout=SOON_S)[1]
    assert not list(SHARED_MEMORY.glob(f"stepvideo_{launcher.pid}_*"))

    folder = tmp_path / "again"
    folder.mkdir()
    with serving(root, folder, config_text, watch) as running:
        again = Server(running.grpc_url, running.http_url, running.pid)
        assert again.grpc(small)["SEED"] == [7]
