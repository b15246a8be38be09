"""Several real servers behind one gateway: each has its share, the urgent goes first, and who dies is replaced."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stepvideo_serve.launch.server import TritonServer
from tests.gateway.conftest import SMALL, Running, create, health, until
from tests.serving.calls import Server
from tests.serving.launch import serving
from tests.serving.test_idempotency import runs_of

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
def other(root: Path, config_text: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that a test may kill."""
    with serving(root, tmp_path_factory.mktemp("other"), config_text) as running:
        yield running


def steps(count: int, **more: Any) -> dict[str, Any]:
    return {**SMALL["extra_body"], "num_inference_steps": count, **more}


def test_jobs_of_a_server_that_dies_are_done_by_another(
    start: Callable[..., Running], server: Server, other: TritonServer, picture: bytes
) -> None:
    lost = Server(other.grpc_url, other.http_url, other.pid)
    begun = runs_of(server), runs_of(lost)
    gateway = start(urls=(server.grpc_url, other.grpc_url))
    until(lambda: all(health(gateway)["servers"].values()), "both servers to be seen")
    ids = [create(gateway, picture, extra_body=steps(60, seed=number)).id for number in range(6)]
    until(lambda: (runs_of(server) - begun[0], runs_of(lost) - begun[1]) == (2, 2), "both to have one and one more")
    client = gateway.client()
    assert sum(client.videos.retrieve(each).status == "queued" for each in ids) >= 4, "one runs at each"
    urgent = create(gateway, picture, extra_body=steps(4, priority="high"))
    assert client.videos.poll(urgent.id, poll_interval_ms=200).status == "completed"
    assert any(client.videos.retrieve(each).status in ("queued", "in_progress") for each in ids), "it went first"
    for process in (psutil.Process(other.pid), *psutil.Process(other.pid).children(recursive=True)):
        process.kill()
    ended = [client.videos.poll(each, poll_interval_ms=200) for each in ids]
    assert [each.status for each in ended] == ["completed"] * 6, [each.error for each in ended]
    assert len({client.videos.download_content(each).read() for each in ids}) == 6
    found = health(gateway)
    assert (found["servers"][server.grpc_url], found["servers"][other.grpc_url]) == (True, False)
