"""Addresses are read alike everywhere, and mean what they say."""

import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tritonclient import grpc

import stepvideo_client.address
from stepvideo_client import Client, InvalidInput
from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch import address
from stepvideo_serve.launch.health import main as health
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer, serve_main
from tests.launch.test_server import MODEL, READY_S, ask, model_repository

Parser = Callable[[str, int], tuple[str, int]]
PARSERS = (address.host_port, stepvideo_client.address.host_port)


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("127.0.0.1:9", ("127.0.0.1", 9)),
        ("video.example.org", ("video.example.org", 8001)),
        ("localhost:65535", ("localhost", 65535)),
        ("::1", ("::1", 8001)),
        ("[::1]", ("::1", 8001)),
        ("[fe80::2]:80", ("fe80::2", 80)),
    ],
)
def test_a_place_is_read(parse: Parser, text: str, place: tuple[str, int]) -> None:
    assert parse(text, 8001) == place
    assert parse(address.joined(*place), 1) == place


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize(
    "text",
    ["", ":8001", "host:", "host:x", "host:0", "host:65536", "http://host:1", "[::1", "[::1]8", "[host]:1", "a b"],
)
def test_what_is_no_place_is_refused(parse: Parser, text: str) -> None:
    with pytest.raises((SetupError, InvalidInput), match=r"correct it|url"):
        parse(text, 8001)


def test_a_client_url_without_a_port_is_the_servers_usual_one() -> None:
    with Client("localhost") as client:
        assert client.url == "localhost:8001"


def test_the_probe_says_what_is_wrong_with_its_url(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        health(["--url", "http://127.0.0.1:8000"])
    assert "must be HOST:PORT" in capsys.readouterr().err


def test_a_name_without_an_address_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_main(["--address", "no-such-host.invalid"]) == 1
    assert "--address must be an IP address of this machine or a name with one" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "ip"), [("localhost", "127.0.0.1"), ("::1", "::1")])
def test_every_port_listens_where_the_address_says(tmp_path: Path, name: str, ip: str) -> None:
    if ip == "::1":
        try:
            socket.create_server((ip, 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
    options = ServerOptions(model_repository(tmp_path, MODEL), address=name, log=tmp_path / "log", exit_timeout_s=2)
    with TritonServer(options) as server:
        server.wait_ready(READY_S)
        sockets = psutil.Process(server.pid).net_connections()
        listening = [entry.laddr.ip for entry in sockets if entry.status == psutil.CONN_LISTEN]
        assert [text.removeprefix("::ffff:") for text in listening] == [ip] * 3
        assert ask(server.grpc_url, "pid")
        with grpc.InferenceServerClient(server.grpc_url) as client:
            assert client.is_server_live()
