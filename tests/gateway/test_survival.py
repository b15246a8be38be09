"""Jobs outlive gateways: each ends exactly once, and no run is begun twice while its server lives."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.gateway.conftest import SMALL, Running, create, health, until
from tests.serving.calls import Server
from tests.serving.test_idempotency import runs_of

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

LONGER: dict[str, Any] = {**SMALL, "extra_body": {**SMALL["extra_body"], "num_inference_steps": 60}}


def ready(start: Callable[..., Running], **more: Any) -> Running:
    running = start(**more)
    until(lambda: health(running)["well"], "the server to be seen")
    return running


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_a_gateway_that_comes_back_finds_the_run(
    start: Callable[..., Running], server: Server, picture: bytes, how: str
) -> None:
    begun = runs_of(server)
    first = ready(start)
    video = create(first, picture, **LONGER)
    until(lambda: first.client().videos.retrieve(video.id).progress >= 5, "progress")
    getattr(first.process, how)()
    first.process.wait(30)
    again = ready(start)
    assert again.client().videos.poll(video.id, poll_interval_ms=200).status == "completed"
    assert runs_of(server) == begun + 1, "the very run"
    assert len(again.client().videos.download_content(video.id).read()) > 500


def test_two_gateways_share_the_jobs(start: Callable[..., Running], server: Server, picture: bytes) -> None:
    begun = runs_of(server)
    gateways = [ready(start), ready(start)]
    videos = [create(gateways[number % 2], picture).id for number in range(6)]
    for number, video_id in enumerate(videos):
        other = gateways[1 - number % 2].client()
        assert other.videos.poll(video_id, poll_interval_ms=200).status == "completed"
    assert runs_of(server) == begun + 6, "each once"


def test_jobs_wait_for_a_server_that_is_away(start: Callable[..., Running], picture: bytes) -> None:
    """It is given num_frames and size, so nothing has to be asked of a server."""
    nobody = start(urls=("127.0.0.1:1",))
    video = create(nobody, picture)
    time.sleep(1.0)
    assert nobody.client().videos.retrieve(video.id).status == "queued"
    assert not health(nobody)["well"]
    nobody.process.terminate()
    nobody.process.wait(30)
    assert ready(start).client().videos.poll(video.id, poll_interval_ms=200).status == "completed"


def test_deleting_while_no_gateway_follows_the_run(start: Callable[..., Running], picture: bytes) -> None:
    """The run goes on at the server, and the gateway that comes back ends it."""
    first = ready(start)
    endless = {**SMALL, "extra_body": {**SMALL["extra_body"], "num_inference_steps": 100_000}}
    video = create(first, picture, **endless)
    until(lambda: first.client().videos.retrieve(video.id).status == "in_progress", "the run to begin")
    first.process.kill()
    first.process.wait(30)
    again = start()
    assert again.client().videos.delete(video.id).deleted
    after = create(again, picture)
    assert again.client().videos.poll(after.id, poll_interval_ms=200).status == "completed", "the ranks are free"


def test_jobs_end_once_while_gateways_are_killed(start: Callable[..., Running], server: Server, picture: bytes) -> None:
    begun, chance = runs_of(server), random.Random(7)
    gateway = ready(start)
    videos = [create(gateway, picture, extra_body={**SMALL["extra_body"], "seed": seed}).id for seed in range(20)]
    for _ in range(4):
        time.sleep(chance.uniform(0.2, 2.0))
        gateway.process.kill()
        gateway.process.wait(30)
        gateway = ready(start)
    client = gateway.client()
    ended = [client.videos.poll(video_id, poll_interval_ms=200) for video_id in videos]
    assert [video.status for video in ended] == ["completed"] * 20
    assert runs_of(server) == begun + 20, "no run twice: the server was there all the time"
    assert len({client.videos.download_content(video_id).read() for video_id in videos}) == 20, "one video each"
