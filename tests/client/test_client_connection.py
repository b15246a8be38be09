import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from stepvideo_client import (
    ClearTextWarning,
    Client,
    DeadlineExceeded,
    InvalidInput,
    InvalidRequest,
    MalformedResponse,
    ServerNotReady,
    ServerUnreachable,
    ServiceUnavailable,
)
from stepvideo_client.address import proxy_for
from tests.client.fake_server import MP4, FakeServer, abort, hang, result, step

Cli = Callable[..., subprocess.CompletedProcess[str]]
NOBODY = "127.0.0.1:1"  # a privileged port that nothing listens on


def test_unary_gives_the_same_result_in_one_call(server: FakeServer) -> None:
    with Client(server.url) as client:
        answer = client.generate_unary(b"png", "a cat", steps=3)
    assert (answer.video, answer.seed) == (MP4, 7)
    assert server.requests[0].model_name == "ti2v_unary"
    assert server.sent() == {"PROMPT": b"a cat", "IMAGE": b"png", "STEPS": 3}


def test_unary_errors_are_typed_by_prefix_then_by_status(server: FakeServer) -> None:
    with Client(server.url) as client:
        server.unary = abort(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT: STEPS must be positive, got 0.")
        with pytest.raises(InvalidRequest) as caught:
            client.generate_unary(b"png", "")
        assert str(caught.value) == "STEPS must be positive, got 0."
        server.unary = abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
        with pytest.raises(ServiceUnavailable, match="Exceeds maximum queue size"):
            client.generate_unary(b"png", "")
        server.unary = step(1, 2)
        with pytest.raises(MalformedResponse, match="Expected a result"):
            client.generate_unary(b"png", "")


def test_unary_deadline_cancels_on_the_server(server: FakeServer) -> None:
    server.unary = hang()
    with Client(server.url) as client, pytest.raises(DeadlineExceeded):
        client.generate_unary(b"png", "", deadline_s=0.3)
    assert server.cancelled.wait(5)


def test_headers_travel_with_every_kind_of_call(server: FakeServer) -> None:
    with Client(server.url, headers={"Authorization": "Bearer x"}) as client:
        list(client.generate(b"png", ""))
        client.generate_unary(b"png", "")
    assert [metadata["authorization"] for metadata in server.metadata] == ["Bearer x", "Bearer x"]


def test_ready_follows_the_server_and_the_model(server: FakeServer) -> None:
    with Client(server.url) as client:
        assert client.is_ready()
        server.model_ready = False
        assert not client.is_ready()
        with pytest.raises(ServerNotReady, match="model ti2v is not ready"):
            client.wait_ready(0.3)


def test_wait_ready_returns_when_the_server_becomes_ready(server: FakeServer) -> None:
    server.ready.clear()
    with Client(server.url) as client:
        waiting = threading.Thread(target=client.wait_ready, args=(30.0,))
        waiting.start()
        assert server.readiness_polls.acquire(timeout=10)
        assert waiting.is_alive()
        server.ready.set()
        waiting.join(10)
        assert not waiting.is_alive()


def test_nobody_there(image: Path) -> None:
    with Client(NOBODY) as client:
        with pytest.raises(ServerUnreachable, match=f"The server at {NOBODY} cannot be reached"):
            next(client.generate(image, "a cat"))
        with pytest.raises(ServerUnreachable):
            client.generate_unary(image, "a cat")
        assert not client.is_ready()
        with pytest.raises(ServerNotReady, match="is not ready after"):
            client.wait_ready(0.3)


def test_tls_against_a_plain_server_is_unreachable(server: FakeServer) -> None:
    with Client(server.url, tls=True) as client, pytest.raises(ServerUnreachable):
        next(client.generate(b"png", "a cat"))


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="without a scheme"):
        Client("http://127.0.0.1:8001")
    with pytest.raises(InvalidInput, match="more than 0 seconds, got 0"):
        Client(idle_timeout_s=0)
    with pytest.raises(InvalidInput, match=r"PEM file .*ca\.pem' cannot be read: No such file"):
        Client(root_certificates=tmp_path / "ca.pem")


def test_a_large_result_arrives_whole(server: FakeServer) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (17, 544, 992, 3), np.uint8)  # 27.5 MB
    server.unary = result(FRAMES=frames)
    with Client(server.url) as client:
        got = client.generate_unary(b"png", "", output="frames").frames
    assert got is not None
    assert np.array_equal(got, frames)


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_loopback_is_reached_without_the_proxy_of_the_environment(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, f"http://{NOBODY}")
    for variable in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(variable, raising=False)
    port = server.url.rpartition(":")[2]
    for url in (server.url, f"localhost:{port}"):
        with Client(url) as client:
            assert client.generate_unary(b"png", "a cat").video == MP4


def test_an_error_about_the_connection_names_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("no_proxy", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", f"http://{NOBODY}")
    said = r"video\.example\.org:8001 .*through the proxy of the environment, http_proxy=http://127\.0\.0\.1:1 "
    with pytest.warns(ClearTextWarning):
        client = Client("video.example.org")
    with client:
        with pytest.raises(ServerUnreachable, match=said):
            client.generate_unary(b"png", "")
        with pytest.raises(ServerNotReady, match=said):
            client.wait_ready(0.5)
    assert proxy_for("video.example.org", {"http_proxy": "p", "no_proxy": "localhost,.example.org"}) is None


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "127.9.9.9:8001", "[::1]:8001", "localhost"])
def test_calls_that_stay_on_this_machine_are_not_warned_of(url: str) -> None:
    Client(url, headers={"Authorization": "Bearer x"}).close()  # a warning would be an error here


@pytest.mark.parametrize("url", ["video.example.org:8001", "192.0.2.7", "[2001:db8::1]:8001"])
def test_clear_text_to_another_machine_is_warned_of_with_the_remedy(url: str) -> None:
    with pytest.warns(ClearTextWarning, match="are not encrypted, others can read prompts, .*: use TLS") as warned:
        Client(url, headers={"Authorization": "Bearer secret"}).close()
    [one] = warned
    assert "the header authorization" in str(one.message)
    assert "secret" not in str(one.message), "the name is enough"
    assert one.filename == __file__
    Client(url, tls=True).close()


def test_the_command_line_warns_once_on_standard_error(cli: Cli) -> None:
    done = cli("ready", "--url", "video.invalid:8001", "--header", "x-token=secret", "--timeout", 0.3)
    [line] = [line for line in done.stderr.splitlines() if "warning" in line]
    assert line.startswith("stepvideo: warning: Calls to video.invalid:8001 are not encrypted, others can read prompts")
    assert "the header x-token" in line
    assert "secret" not in done.stderr
