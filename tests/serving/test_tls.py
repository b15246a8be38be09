"""TLS and mutual TLS on gRPC, with the real server and certificates made here."""

import contextlib
import http.client
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest
import trustme
from tritonclient.grpc import service_pb2, service_pb2_grpc

from stepvideo_client import Client, Result, ServerUnreachable
from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch.http_key import find_http_key, leave_http_key
from stepvideo_serve.launch.options import OPERATOR_HEADER, ServerOptions, ServerSecurity
from stepvideo_serve.launch.server import TritonServer
from stepvideo_serve.launch.stopping import LauncherFolder, unanswered
from tests.launch.test_server import MODEL, model_repository
from tests.server_deaths import WatchServer
from tests.serving.calls import Values
from tests.serving.launch import READY_S

ANSWER_S = 30.0


@dataclass(frozen=True)
class Party:
    """Somebody with a certificate: the PEM files of its chain and its key."""

    chain: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """Who signs certificates, and the PEM file by which others know it."""

    authority: trustme.CA
    root: Path

    @classmethod
    def create(cls, folder: Path, name: str) -> "Authority":
        authority = trustme.CA(organization_name=name)
        root = folder / f"{name}.pem"
        authority.cert_pem.write_to_path(str(root))
        return cls(authority, root)

    def issue(self, name: str, *identities: str) -> Party:
        issued = self.authority.issue_cert(*identities)
        party = Party(self.root.with_name(f"{name}.chain.pem"), self.root.with_name(f"{name}.key.pem"))
        issued.private_key_pem.write_to_path(str(party.key))
        for part in issued.cert_chain_pems:
            part.write_to_path(str(party.chain), append=True)
        return party


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that the server does not know."""
    return Authority.create(tmp_path_factory.mktemp("theirs"), "theirs")


@pytest.fixture(scope="module")
def service(ours: Authority) -> Party:
    return ours.issue("service", "127.0.0.1")


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, service: Party, watch: WatchServer) -> Iterator[TritonServer]:
    """A server of a trivial model whose gRPC port speaks TLS to anybody."""
    folder = tmp_path_factory.mktemp("encrypted")
    security = ServerSecurity(service.chain, service.key)
    options = ServerOptions(model_repository(folder, MODEL), log=folder / "log", exit_timeout_s=2, security=security)
    with TritonServer(options) as server, watch(server):
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def mutual(
    root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    config_text: str,
    ours: Authority,
    service: Party,
    watch: WatchServer,
) -> Iterator[TritonServer]:
    """The real models; callers must have a certificate of `ours`."""
    folder = tmp_path_factory.mktemp("mutual")
    config = folder / "serve.toml"
    config.write_text(config_text, encoding="utf-8")
    security = ServerSecurity(service.chain, service.key, ours.root)
    log = folder / "server.log"
    options = ServerOptions(root / "model_repository", config, log=log, exit_timeout_s=2, security=security)
    with TritonServer(options) as server, watch(server):
        server.wait_ready(READY_S)
        yield server


def is_live(url: str, credentials: grpc.ChannelCredentials | None) -> bool:
    """The server's answer. Raises grpc.RpcError when there is no connection to be had."""
    with contextlib.closing(
        grpc.insecure_channel(url) if credentials is None else grpc.secure_channel(url, credentials)
    ) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return bool(stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=ANSWER_S).live)


def credentials_of(root: Path, party: Party | None = None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root.read_bytes(), party and party.key.read_bytes(), party and party.chain.read_bytes()
    )


def assert_refused(url: str, credentials: grpc.ChannelCredentials | None) -> None:
    with pytest.raises(grpc.RpcError) as refusal:
        is_live(url, credentials)
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


def test_tls_answers_who_knows_its_authority(encrypted: TritonServer, ours: Authority) -> None:
    assert is_live(encrypted.grpc_url, credentials_of(ours.root))


def test_tls_is_not_spoken_to_who_does_not_know_it(encrypted: TritonServer, theirs: Authority) -> None:
    assert_refused(encrypted.grpc_url, credentials_of(theirs.root))


def test_with_tls_there_is_no_plain_grpc(encrypted: TritonServer) -> None:
    assert_refused(encrypted.grpc_url, None)


def test_the_key_does_not_show(encrypted: TritonServer, service: Party) -> None:
    log = encrypted.options.log
    assert log is not None
    assert service.key.read_text().splitlines()[1] not in log.read_text()


def test_mutual_tls_generates_for_its_clients(mutual: TritonServer, ours: Authority, small: Values) -> None:
    caller = ours.issue("caller", "caller.example.org")
    with Client(
        mutual.grpc_url, root_certificates=ours.root, private_key=caller.key, certificate_chain=caller.chain
    ) as client:
        image = small["IMAGE"]
        assert isinstance(image, bytes)
        events = list(client.generate(image, "a cat", num_frames=17, height=64, width=96, steps=2, seed=7))
    assert isinstance(events[-1], Result)


def test_mutual_tls_refuses_everybody_else(mutual: TritonServer, ours: Authority, theirs: Authority) -> None:
    stranger = theirs.issue("stranger", "caller.example.org")
    assert_refused(mutual.grpc_url, credentials_of(ours.root))
    assert_refused(mutual.grpc_url, credentials_of(ours.root, stranger))
    assert_refused(mutual.grpc_url, None)
    with (
        Client(mutual.grpc_url, root_certificates=ours.root) as client,
        pytest.raises(ServerUnreachable),
    ):
        client.generate_unary(b"an image", "a cat")


FOR_NOBODY_ELSE = [
    ("GET", "/v2"),
    ("GET", "/v2/models/ti2v"),
    ("GET", "/v2/models/ti2v/config"),
    ("GET", "/v2/models/ti2v/stats"),
    ("GET", "/v2/models/stats"),
    ("POST", "/v2/models/ti2v_unary/infer"),
    ("POST", "/v2/models/ti2v/generate"),
    ("POST", "/v2/models/ti2v/generate_stream"),
    ("POST", "/v2/models/dit_denoiser/infer"),
    ("POST", "/v2/repository/index"),
]


def over_http(server: TritonServer, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """Status and text."""
    with contextlib.closing(http.client.HTTPConnection(server.http_url, timeout=ANSWER_S)) as connection:
        connection.request(method, path, "{}" if method == "POST" else None, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


@pytest.mark.parametrize(("method", "path"), FOR_NOBODY_ELSE)
@pytest.mark.parametrize("headers", [{}, {OPERATOR_HEADER: "guessed" * 6}])
def test_with_mutual_tls_http_is_not_a_way_around(
    mutual: TritonServer, method: str, path: str, headers: dict[str, str]
) -> None:
    _, said = over_http(mutual, method, path, headers)
    assert "This API is restricted" in said


def test_with_mutual_tls_http_still_tells_health(mutual: TritonServer) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/ti2v/ready"):
        assert over_http(mutual, "GET", path, {}) == (http.HTTPStatus.OK, "")


def test_probes_of_the_servers_user_find_the_key(mutual: TritonServer, root: Path, tmp_path: Path) -> None:
    assert unanswered(mutual.http_url) == 0
    command = [sys.executable, "-m", "stepvideo_serve", "health", "--url", mutual.http_url, "--timeout", "30"]
    run = partial(subprocess.run, command, cwd=root, capture_output=True, text=True, check=False)
    done = run()
    assert (done.returncode, done.stdout[:6]) == (0, "ready:"), done.stderr
    elsewhere = run(env={**os.environ, "TMPDIR": str(tmp_path)})
    assert elsewhere.returncode == 1
    assert "This API is restricted" in elsewhere.stderr


def test_the_key_is_the_servers_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = LauncherFolder("stepvideo_1_test")
    folder.make()
    leave_http_key(folder.path, 8000, {OPERATOR_HEADER: "key"})
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert find_http_key("127.0.0.1", 8000) == {OPERATOR_HEADER: "key"}
    assert find_http_key("127.0.0.1", 8001) == {}
    assert find_http_key("video.example.org", 8000) == {}, "it never leaves the machine"
    folder.remove()
    assert find_http_key("127.0.0.1", 8000) == {}


def test_http_has_no_tls_and_so_stays_on_loopback(service: Party) -> None:
    security = ServerSecurity(service.chain, service.key)
    assert security.http_address("0.0.0.0") == "127.0.0.1"
    assert security.http_address("127.0.0.2") == "127.0.0.2"
    assert security.warning("0.0.0.0") is None
    plain = ServerSecurity()
    assert plain.http_address("0.0.0.0") == "0.0.0.0"
    assert "not encrypted" in (plain.warning("0.0.0.0") or "")
    assert plain.warning("127.0.0.1") is None


def test_the_server_is_told_so(tmp_path: Path, service: Party) -> None:
    security = ServerSecurity(service.chain, service.key)
    assert TritonServer(ServerOptions(tmp_path, address="0.0.0.0", security=security)).http_address == "127.0.0.1"
    assert TritonServer(ServerOptions(tmp_path, address="0.0.0.0")).http_address == "0.0.0.0"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"certificate": "chain"}, "A certificate and its private key go together, got one of them"),
        ({"private_key": "key"}, "A certificate and its private key go together, got one of them"),
        ({"client_authority": "chain"}, "A client authority needs the server's own certificate and key"),
        ({"certificate": "key", "private_key": "chain"}, "The certificate must be a PEM file with a CERTIFICATE"),
        ({"certificate": "chain", "private_key": "chain"}, "The private key must be a PEM file with a PRIVATE KEY"),
        ({"certificate": "none", "private_key": "key"}, "The certificate must be readable, .*: No such file"),
        ({"certificate": "binary", "private_key": "key"}, "The certificate must be readable, .*: it is not ASCII"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, service: Party, given: dict[str, str], message: str) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    files = {"chain": service.chain, "key": service.key, "none": tmp_path / "none", "binary": tmp_path / "binary"}
    with pytest.raises(SetupError, match=message):
        ServerSecurity(**{name: files[file] for name, file in given.items()})
