"""KEEP_S and ti2v_cancel on the real server: a run outlives its caller, is found again, and is cancelled by its id."""

import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from stepvideo_client import Client
from tests.serving.calls import PATIENCE_S, Outputs, Refused, Server, Values, outputs_of, report_of, until
from tests.serving.test_idempotency import is_repeated, runs_of

# A caller in a process of its own, which can be killed.
CALLER = """
import sys
from stepvideo_client import Client
url, image, request_id, keep_s = sys.argv[1:]
client = Client(url)
options = dict(num_frames=17, height=64, width=64, steps=60, seed=7, output="latents", cfg_scale=4.0)
for event in client.generate(image, "a cat", request_id=request_id, keep_s=float(keep_s), **options):
    print(getattr(event, "step", "result"), flush=True)
"""


@pytest.fixture
def request_id() -> str:
    return f"keep-{uuid.uuid4()}"


@pytest.fixture
def image(tmp_path: Path, small: Values) -> Path:
    path = tmp_path / "first.png"
    content = small["IMAGE"]
    assert isinstance(content, bytes)
    path.write_bytes(content)
    return path


def options(request_id: str, **more: float) -> dict[str, object]:
    """What CALLER asks for."""
    sizes: dict[str, object] = {"num_frames": 17, "height": 64, "width": 64, "steps": 60, "seed": 7, "cfg_scale": 4.0}
    return {**sizes, "output": "latents", "request_id": request_id, **more}


def killed_caller(server: Server, root: Path, image: Path, request_id: str, keep_s: float) -> int:
    """A caller gets SIGKILL after its second step; the step that it saw last."""
    line = [sys.executable, "-c", CALLER, server.grpc_url, str(image), request_id, str(keep_s)]
    with subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        step = 0
        while step < 2:
            step = int(caller.stdout.readline())
        caller.kill()
    return step


def cancelled(server: Server, request_id: str) -> Outputs:
    return server.grpc({"REQUEST_ID": request_id.encode()}, "ti2v_cancel")


def test_a_run_outlives_a_killed_caller_and_is_found_again(
    server: Server, root: Path, image: Path, request_id: str
) -> None:
    begun = runs_of(server)
    killed_caller(server, root, image, request_id, 300.0)
    with Client(server.grpc_url) as client:
        events = list(client.generate(image, "a cat", **options(request_id)))  # type: ignore[arg-type]
        assert runs_of(server) == begun + 1, "it is the very run"
        assert events[-1].report["repeated"] is True  # type: ignore[union-attr]
        again = list(client.generate(image, "a cat", **options(request_id)))  # type: ignore[arg-type]
    assert len(again) == 1
    np.testing.assert_array_equal(again[0].latents, events[-1].latents)  # type: ignore[union-attr,arg-type]


def test_without_it_the_run_ends_with_its_caller(
    server: Server, root: Path, image: Path, request_id: str, small: Values
) -> None:
    begun = runs_of(server)
    killed_caller(server, root, image, request_id, 0.0)
    server.grpc(small)  # waits for the ranks: the run has ended by then
    with Client(server.grpc_url) as client:
        result = list(client.generate(image, "a cat", **options(request_id)))[-1]  # type: ignore[arg-type]
    assert "repeated" not in result.report  # type: ignore[union-attr]
    assert runs_of(server) == begun + 3


def test_a_run_without_callers_ends_when_its_time_is_over(server: Server, long: Values, request_id: str) -> None:
    values: Values = {**long, "REQUEST_ID": request_id.encode(), "KEEP_S": np.array([1.0], np.float32)}
    with server.open(values) as stream:
        stream.wait_for_step(1)
    until(lambda: report_of(server.grpc({"KIND": b"pace"}, "dit_denoiser"))["waiting"] == 0, "the queue")
    until(lambda: not cancelled(server, request_id)["CANCELLED"][0], "the run of hours to end by itself")


def test_a_run_is_cancelled_by_id_from_another_process(
    server: Server, root: Path, request_id: str, long: Values, small: Values
) -> None:
    values: Values = {**long, "REQUEST_ID": request_id.encode(), "KEEP_S": np.array([3600.0], np.float32)}
    with server.open(values) as stream:
        stream.wait_for_step(2)
        done = subprocess.run(
            [sys.executable, "-m", "stepvideo_client", "cancel", request_id, "--url", server.grpc_url],
            cwd=root / "client",
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, f"{request_id}: cancelled\n"), done.stderr
        began_s = time.monotonic()
        with pytest.raises(Refused, match=f"CANCELLED: The run of the REQUEST_ID '{request_id}' was cancelled"):
            stream.collect()
        assert time.monotonic() - began_s < PATIENCE_S / 4, "and not after hours"
    assert server.grpc(small)["SEED"] == [7], "the ranks are free"
    assert not cancelled(server, request_id)["CANCELLED"][0], "nothing is known of it any more"


def test_one_that_waits_without_a_caller_is_cancelled_too(
    server: Server, long: Values, small: Values, request_id: str
) -> None:
    waits: Values = {**small, "REQUEST_ID": request_id.encode(), "KEEP_S": np.array([3600.0], np.float32)}
    with server.open(long) as running:
        running.wait_for_step(1)
        with server.open(waits) as stream:
            until(lambda: server.waiting() == 1, "the request to wait")
            stream.cancel()
        assert server.waiting() == 1, "it waits on"
        outputs = cancelled(server, request_id)
        assert outputs["CANCELLED"][0]
        assert report_of(outputs) == {"models": ["ti2v"]}
        until(lambda: server.waiting() == 0, "it to leave the queue")


def test_unary_calls_are_kept_and_results_are_forgotten_by_id(server: Server, small: Values, request_id: str) -> None:
    values: Values = {**small, "REQUEST_ID": request_id.encode(), "KEEP_S": np.array([60.0], np.float32)}
    begun = runs_of(server)
    with server.grpc_call({**values, "STEPS": np.array([60], np.int32)}) as call:
        until(lambda: runs_of(server) > begun, "the call to have begun")
        call.cancel()
    with server.grpc_call({**values, "STEPS": np.array([60], np.int32)}) as call:
        assert is_repeated(outputs_of(call.result(PATIENCE_S)))
    outputs = cancelled(server, request_id)
    assert report_of(outputs) == {"models": ["ti2v_unary"]}
    with server.grpc_call({**values, "STEPS": np.array([60], np.int32)}) as call:
        assert not is_repeated(outputs_of(call.result(PATIENCE_S))), "it ran anew"
    assert runs_of(server) == begun + 2


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "INVALID_ARGUMENT: REQUEST_ID is required"),
        ({"REQUEST_ID": b"two words"}, "INVALID_ARGUMENT: REQUEST_ID must"),
        ({"REQUEST_ID": b"x" * 129}, "INVALID_ARGUMENT: REQUEST_ID must"),
    ],
)
def test_a_wrong_id_is_refused(server: Server, values: Values, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        server.grpc(values, "ti2v_cancel")


def test_keeping_needs_an_id(server: Server, small: Values) -> None:
    with pytest.raises(Refused, match="INVALID_ARGUMENT: KEEP_S = 5 must come with a REQUEST_ID, got none"):
        server.grpc({**small, "KEEP_S": np.array([5.0], np.float32)})
