"""One video from its request to the mp4, against a gateway that falls silent, hangs up and loses its servers."""

import asyncio
import itertools
import re
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from comfyui import job
from comfyui.address import Address
from comfyui.errors import Away, Failed, Interrupted, Refused
from comfyui.gateway import connected
from tests.comfyui.unit.scripted import (
    DONE,
    Recorder,
    Scripted,
    animation,
    refusal,
    request,
    running,
    says,
    serving,
    silent,
    text_of,
    video,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of seconds become such of milliseconds."""
    for name, seconds in (("QUIET_S", 0.1), ("PAUSE_S", 0.02), ("TICK_S", 0.01)):
        monkeypatch.setattr(job, name, seconds)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """The gateway may take its time between two events."""
    del quick
    monkeypatch.setattr(job, "QUIET_S", 20.0)


def made(scripted: Scripted, host: Recorder, idle_timeout_s: float = 60.0) -> Any:
    async def run() -> job.Made:
        async with serving(scripted, idle_timeout_s) as gateway:
            return await job.make(gateway, request(), host)

    return finish(run())


def finish(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(bounded())


@pytest.mark.usefixtures("patient")
def test_progress_and_texts_follow_the_events() -> None:
    host = Recorder()
    waiting = video(queue_position=2, start_in_s=90.0)
    stream = says(video(), waiting, running(1), running(2), then=says(DONE), seen=lambda said: len(host.texts) >= said)
    scripted = Scripted(stream, content=b"the very mp4")
    result = made(scripted, host)
    assert (result.mp4, result.video, result.repeated) == (b"the very mp4", DONE, False)
    assert host.texts[:3] == ["Waits for a server", "Waits at place 2, begins in about 90 s", "Step 1 of 4"]
    assert re.fullmatch("Step 2 of 4, about [0-9]+ s left", host.texts[3])
    assert host.steps == [(0.0, 1), (1.0, 4), (2.0, 4)]
    assert scripted.calls == ["create", "events", "content"]


@pytest.mark.usefixtures("patient")
def test_an_animated_preview_is_played_and_begins_again() -> None:
    host = Recorder()
    preview = {"id": "v1", "step": 1, "media_type": "image/webp", "data": text_of(animation(10, 90, 200))}
    made(
        Scripted(says(running(1), preview, then=says(DONE), seen=lambda said: len(host.pictures) >= 5 * (said - 1))),
        host,
    )
    greys = [one.getpixel((0, 0))[0] for one in host.pictures]
    assert set(greys) == {10, 90, 200}
    assert all(one != following for one, following in itertools.pairwise(greys)), "a frame is sent once"
    assert host.steps[-1] == (1.0, 4)


def test_bytes_that_are_no_preview_cost_nothing() -> None:
    host = Recorder()
    broken = [
        {"id": "v1", "step": 1, "media_type": "image/webp", "data": data} for data in (text_of(b"none"), "?", None)
    ]
    made(Scripted(says(running(1), *broken, DONE)), host)
    assert host.pictures == []


def test_a_video_that_is_there_is_fetched_at_once() -> None:
    scripted = Scripted(silent, status="completed")
    assert made(scripted, Recorder()).repeated
    assert scripted.calls == ["create", "content"]


def test_a_job_that_failed_before_is_made_anew() -> None:
    scripted = Scripted(says(DONE))
    scripted.created = ["failed", "queued"]
    made(scripted, Recorder())
    assert scripted.calls == ["create", "delete", "create", "events", "content"]
    assert len(set(scripted.keys)) == 1


@pytest.mark.parametrize("hang_up", [says(running(1)), says(running(1), then=silent)], ids=["closed", "silent"])
def test_a_lost_connection_is_made_again(hang_up: Any) -> None:
    scripted = Scripted(hang_up, hang_up, says(running(3), DONE))
    made(scripted, Recorder())
    assert scripted.calls == ["create", "events", "events", "events", "content"]


def test_an_interrupt_ends_the_run() -> None:
    scripted = Scripted(says(running(1), then=silent))
    with pytest.raises(Interrupted):
        made(scripted, Recorder(patience=5))
    assert scripted.calls == ["create", "events", "delete"]


def test_an_interrupt_leaves_a_video_that_is_there() -> None:
    scripted = Scripted(silent, status="completed")
    with pytest.raises(Interrupted):
        made(scripted, Recorder(patience=1))
    assert "delete" not in scripted.calls


def test_an_interrupt_while_the_job_is_made_ends_it_too() -> None:
    scripted = Scripted(silent)
    scripted.slow_s = 0.3
    with pytest.raises(Interrupted):
        made(scripted, Recorder(patience=2))
    assert scripted.calls == ["create", "delete"]


def test_a_node_that_is_cancelled_ends_its_run() -> None:
    """ComfyUI cancels the nodes that still wait when another one of the workflow has failed."""
    scripted = Scripted(says(running(1), then=silent))

    async def run() -> None:
        async with serving(scripted) as gateway:
            making = asyncio.ensure_future(job.make(gateway, request(), Recorder()))
            await asyncio.sleep(0.3)
            making.cancel()
            with pytest.raises(asyncio.CancelledError):
                await making

    finish(run())
    assert scripted.calls[-1] == "delete"


def test_a_gateway_that_is_gone_is_an_error_after_the_idle_timeout() -> None:
    async def run() -> None:
        scripted = Scripted(says(running(1), then=silent))
        async with serving(scripted, idle_timeout_s=0.5) as gateway:
            making = asyncio.ensure_future(job.make(gateway, request(), Recorder()))
            await asyncio.sleep(0.2)
            scripted.streams = [silent]
            await making

    with pytest.raises(Away, match=r"has given no sign of life for 0\.5 s: queue the workflow again when it is back"):
        finish(run())


@pytest.mark.usefixtures("patient")
def test_a_long_wait_is_no_silence_even_for_a_short_timeout() -> None:
    async def run() -> None:
        scripted = Scripted(says(video(queue_position=1), then=silent))
        async with serving(scripted, idle_timeout_s=1.0) as gateway:
            making = asyncio.ensure_future(job.make(gateway, request(), Recorder()))
            await asyncio.sleep(2.5)
            scripted.streams = [says(DONE)]
            await making

    finish(run())


def test_a_gateway_without_a_server_is_an_error_after_the_idle_timeout() -> None:
    scripted = Scripted(says(video(), then=silent))
    scripted.well = False
    with pytest.raises(Away, match=r"has no server that is ready, .* since 0\.5 s"):
        made(scripted, Recorder(), idle_timeout_s=0.5)
    assert "delete" not in scripted.calls, "the job waits for the server, and the next run of the workflow finds it"


@pytest.mark.usefixtures("patient")
def test_a_gateway_that_dies_is_gone_and_not_without_a_server() -> None:
    """It has not said so: its last words were a step."""

    async def run() -> None:
        spoken = asyncio.Event()
        stream = says(running(1), running(2), then=silent, seen=lambda said: said > 1 or spoken.is_set())
        async with serving(Scripted(stream), idle_timeout_s=2.0) as gateway:
            making = asyncio.ensure_future(job.make(gateway, request(), Recorder()))
            await asyncio.sleep(0.1)
            gateway.address = replace(gateway.address, url="http://127.0.0.1:9")  # for what is asked from now on
            await asyncio.sleep(0.3)
            spoken.set()
            await making

    with pytest.raises(Away, match="has given no sign of life for 2 s"):
        finish(run())


def test_a_gateway_that_was_never_there_is_an_error_soon() -> None:
    async def run() -> None:
        async with connected(Address("http://127.0.0.1:9", "", 60.0)) as gateway:
            await job.make(gateway, request(), Recorder())

    with pytest.raises(Away, match=r"The gateway at http://127\.0\.0\.1:9 does not answer: "):
        finish(run())


def test_a_failed_video_is_the_servers_sentence() -> None:
    failed = video(status="failed", error={"code": "server_error", "message": "The ranks were lost."})
    with pytest.raises(Failed, match=r"^The ranks were lost\.$"):
        made(Scripted(says(failed)), Recorder())


def test_a_deleted_video_is_an_error() -> None:
    with pytest.raises(Failed, match="deleted at the gateway"):
        made(Scripted(says(running(1), {"id": "v1"})), Recorder())


def test_a_refusal_is_the_gateways_sentence() -> None:
    scripted = Scripted(silent)
    scripted.refusals = [refusal(400, "num_frames must be a multiple of 17, got 20: 17 is the nearest.")]
    with pytest.raises(Refused, match=r"^num_frames must be a multiple of 17, got 20: 17 is the nearest\.$"):
        made(scripted, Recorder())
    assert scripted.calls == ["create"]


def test_a_gateway_that_is_away_for_a_moment_is_asked_again() -> None:
    scripted = Scripted(says(DONE))
    scripted.refusals = [refusal(503, "The database is away.") for _ in range(job.TRIES - 1)]
    made(scripted, Recorder())
    assert scripted.calls.count("create") == job.TRIES
    assert len(set(scripted.keys)) == 1


def test_what_is_no_gateway_is_said() -> None:
    scripted = Scripted(silent)
    page = refusal(404, "")
    page.text = "<html>Not found</html>"
    scripted.refusals = [page]
    with pytest.raises(Refused, match=r"answered with HTTP 404: see that the address is a gateway's\.$"):
        made(scripted, Recorder())
