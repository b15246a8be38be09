"""TLS and mutual TLS from the gateway to the real server, with certificates made here."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from stepvideo_client import AsyncClient, Client
from stepvideo_gateway.config import GatewayConfig, Servers
from stepvideo_gateway.errors import ConfigError
from stepvideo_serve.launch.server import TritonServer
from tests.gateway.conftest import Running, create, health, until
from tests.serving.test_tls import Authority, Party, mutual, ours, service, theirs  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


def test_a_gateway_with_a_certificate_is_served_and_others_are_not(
    start: Callable[..., Running],
    mutual: TritonServer,  # noqa: F811
    ours: Authority,  # noqa: F811
    theirs: Authority,  # noqa: F811
    picture: bytes,
    tmp_path: Path,
) -> None:
    urls = (mutual.grpc_url,)
    strangers = (
        "",
        f'root_certificates = "{ours.root}"',
        f'root_certificates = "{theirs.root}"\n{own_files(theirs.issue("stranger", "gateway.example.org"))}',
    )
    for number, lines in enumerate(strangers, 1):
        stranger = start(urls=urls, servers=lines)
        log = tmp_path / f"gateway{number}.log"
        until(lambda log=log: "server_away: 127.0.0.1" in log.read_text(encoding="utf-8"), "the refusal")  # type: ignore[misc]
        assert not health(stranger)["well"]
        stranger.process.kill()
    party = ours.issue("gateway", "gateway.example.org")
    gateway = start(urls=urls, servers=f'root_certificates = "{ours.root}"\n{own_files(party)}')
    until(lambda: health(gateway)["well"], "the server to be seen")
    video = create(gateway, picture)
    assert gateway.client().videos.poll(video.id, poll_interval_ms=200).status == "completed"


def own_files(party: Party) -> str:
    return f'private_key = "{party.key}"\ncertificate_chain = "{party.chain}"'


def test_why_a_server_is_not_ready_is_told(mutual: TritonServer, ours: Authority) -> None:  # noqa: F811
    party = ours.issue("asker", "gateway.example.org")

    async def ask(root: Path) -> str | None:
        async with AsyncClient(
            mutual.grpc_url, root_certificates=root, private_key=party.key, certificate_chain=party.chain
        ) as client:
            return await client.why_not_ready()

    assert asyncio.run(ask(ours.root)) is None
    with Client(mutual.grpc_url) as plain:
        assert plain.why_not_ready()


def test_files_are_beside_the_configuration_and_are_looked_at(tmp_path: Path, ours: Authority) -> None:  # noqa: F811
    party = ours.issue("files", "gateway.example.org")
    path = tmp_path / "gateway.toml"
    path.write_text('[servers]\nroot_certificates = "ca.pem"\n', encoding="utf-8")
    servers = GatewayConfig.load(path).servers
    assert servers.root_certificates == str(tmp_path / "ca.pem")
    with pytest.raises(ConfigError, match=r"root_certificates must be a PEM file, .*ca.pem: No such file"):
        servers.check_files()
    (tmp_path / "ca.pem").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="it is not ASCII"):
        servers.check_files()
    with pytest.raises(ConfigError, match="private_key must be a PEM file with a PRIVATE KEY"):
        Servers(private_key=str(party.chain), certificate_chain=str(party.chain)).check_files()
    Servers(private_key=str(party.key), certificate_chain=str(party.chain)).check_files()
    path.write_text('[servers]\nprivate_key = "key.pem"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="private_key and certificate_chain go together"):
        GatewayConfig.load(path)
