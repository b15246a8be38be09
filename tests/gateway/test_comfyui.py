"""The jobs of ComfyUI's nodes against the real gateway; tests/comfyui/real has ComfyUI itself."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comfyui.address import Address
from comfyui.errors import Away, Interrupted, Refused
from comfyui.gateway import connected
from comfyui.job import Made, make
from comfyui.report import quote_of
from comfyui.request import Request, blank_png, fields_of, video_fields
from stepvideo_gateway import media
from tests.gateway.conftest import Running, health, until

SETTINGS: dict[str, Any] = {
    "width": 96,
    "height": 64,
    "num_frames": 17,
    "steps": 4,
    "guidance": 4.0,
    "shift": 7.0,
    "quality": "exact",
    "other_preset": "",
    "priority": "normal",
}
ENDLESS = {"steps": 100_000, "width": 192, "height": 192, "num_frames": 34}


class Node:
    """A Host that keeps what it is shown, and is interrupted at a step."""

    def __init__(self, interrupted_at: float = -1.0, at_once: bool = False) -> None:
        self.texts: list[str] = []
        self.steps: list[tuple[float, float]] = []
        self.pictures: list[bytes] = []
        self._interrupted_at, self._interrupted = interrupted_at, at_once

    def interrupted(self) -> bool:
        return self._interrupted

    async def progress(self, value: float, most: float, picture: Any | None) -> None:
        self.pictures += [] if picture is None else [picture.tobytes()]
        self.steps.append((value, most))
        self._interrupted |= 0 < self._interrupted_at <= value

    def say(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def gateway(start: Callable[..., Running]) -> Running:
    running = start()
    until(lambda: health(running)["well"], "the server to be seen")
    return running


def asked(picture: bytes, seed: int = 7, **cost: Any) -> Request:
    return Request(video_fields(fields_of(**SETTINGS | cost), "a cat", "", 5.0, seed), picture)


def made(gateway: Running, request: Request, node: Node, key: str = "", idle_timeout_s: float = 60.0) -> Made:
    async def run() -> Made:
        async with connected(Address(gateway.url, key, idle_timeout_s)) as connection:
            return await make(connection, request, node)

    return asyncio.run(asyncio.wait_for(run(), 240))


def test_a_video_is_made_and_found_again(gateway: Running, picture: bytes, tmp_path: Path) -> None:
    node = Node()
    first = made(gateway, asked(picture, steps=40), node)
    assert not first.repeated
    assert len(set(node.pictures)) > 1, "the preview moves"
    path = tmp_path / "video.mp4"
    path.write_bytes(first.mp4)
    assert len(list(media.frames(path))) == 17
    values = [value for value, _ in node.steps]
    assert values == sorted(values)
    assert node.steps[-1][1] in (1, 40)
    again = made(gateway, asked(picture, steps=40), Node())
    assert again.repeated
    assert (again.mp4, again.video["id"]) == (first.mp4, first.video["id"])
    assert made(gateway, asked(picture, seed=8), Node()).video["id"] != first.video["id"]


def test_an_interrupt_ends_the_run_within_a_step(gateway: Running, picture: bytes) -> None:
    with pytest.raises(Interrupted):
        made(gateway, asked(picture, **ENDLESS), Node(interrupted_at=1.0))
    assert health(gateway)["jobs"] == {}
    assert not made(gateway, asked(picture), Node()).repeated, "the ranks are free"
    with pytest.raises(Interrupted):
        made(gateway, asked(picture, seed=9), Node(at_once=True))
    assert health(gateway)["jobs"] == {"completed": 1}, "nothing was begun"


def test_a_job_that_was_cancelled_is_made_anew(gateway: Running, picture: bytes) -> None:
    """Failures stay readable at the gateway, but are no answer to the same question."""
    import stepvideo_client

    failing = asked(picture, **ENDLESS)

    async def run() -> None:
        async with connected(Address(gateway.url, "", 60.0)) as connection:
            begun = await connection.create(failing.fields, failing.picture, failing.key)
            with stepvideo_client.Client(server_of(gateway)) as client:
                until(lambda: health(gateway)["jobs"].get("in_progress"), "the run to begin")
                client.cancel(begun["id"])
            until(lambda: health(gateway)["jobs"].get("failed"), "the job to fail")

    asyncio.run(run())
    node = Node(interrupted_at=1.0)
    with pytest.raises(Interrupted):
        made(gateway, failing, node)
    assert node.steps[-1][0] >= 1, "a new run was begun"


def server_of(gateway: Running) -> str:
    [url] = health(gateway)["servers"]
    return str(url)


def test_refusals_are_the_gateways_sentences(gateway: Running, picture: bytes, start: Callable[..., Running]) -> None:
    with pytest.raises(Refused, match="num_frames must be a multiple of 17, got 20: 17 is the nearest"):
        made(gateway, asked(picture, num_frames=20), Node())
    with pytest.raises(Refused, match="QUALITY"):
        made(gateway, asked(picture, other_preset="nosuch"), Node())
    with pytest.raises(Refused) as refused:
        made(start(api="require_key = true"), asked(picture), Node(), key="wrong")
    assert refused.value.status == 401


def test_a_gateway_without_a_server_is_given_up(start: Callable[..., Running], picture: bytes) -> None:
    lonely = start(urls=("127.0.0.1:9",))
    with pytest.raises(Away, match=r"has no server that is ready, .* since 6 s"):
        made(lonely, asked(picture), Node(), idle_timeout_s=6.0)


def test_a_gateway_that_dies_is_given_up_and_comes_back(start: Callable[..., Running], picture: bytes) -> None:
    lost = start()
    until(lambda: health(lost)["well"], "the server to be seen")

    class Killer(Node):
        async def progress(self, value: float, most: float, picture: Any | None) -> None:
            await super().progress(value, most, picture)
            if value:
                lost.process.kill()

    with pytest.raises(Away, match="has given no sign of life for 5 s"):
        made(lost, asked(picture, seed=5, steps=200), Killer(), idle_timeout_s=5.0)
    back = start()
    result = made(back, asked(picture, seed=5, steps=200), Node())
    assert len(health(back)["jobs"]) == 1
    assert result.video["created_at"] <= result.video["completed_at"]


def test_a_quote(gateway: Running, picture: bytes) -> None:
    made(gateway, asked(picture), Node())

    async def run() -> dict[str, Any]:
        async with connected(Address(gateway.url, "", 60.0)) as connection:
            return await connection.quote({**fields_of(**SETTINGS), "prompt": "quote"}, blank_png())

    assert " of work, begins in about " in quote_of(asyncio.run(run()))
