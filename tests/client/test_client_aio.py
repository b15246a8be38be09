"""The asyncio client against the scripted server: what `Client` promises holds for it, too."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from stepvideo_client import (
    AsyncClient,
    Client,
    ClientError,
    InvalidInput,
    InvalidRequest,
    MalformedResponse,
    QueueFull,
    Result,
    ServerNotReady,
    ServerUnreachable,
    ServiceUnavailable,
    StepEvent,
    StreamStalled,
)
from tests.client.fake_server import MP4, REPORT, FakeServer, abort, error, final, hang, respond, result, step, wait

Events = list[StepEvent | Result]


def collected(server: FakeServer, idle_timeout_s: float | None = 60.0, **options: Any) -> Events:
    async def run() -> Events:
        async with AsyncClient(server.url, idle_timeout_s=idle_timeout_s) as client:
            return [event async for event in client.generate(b"png", "a cat", **options)]

    return asyncio.run(run())


def test_yields_a_step_event_per_step_and_then_the_result(server: FakeServer) -> None:
    *steps, end = collected(server, seed=7, keep_s=5.0, request_id="a")
    assert steps == [StepEvent(1, 2, 0.5), StepEvent(2, 2, 1.0)]
    assert isinstance(end, Result)
    assert (end.video, end.seed, end.report) == (MP4, 7, REPORT)
    assert server.sent() == {"PROMPT": b"a cat", "IMAGE": b"png", "SEED": 7, "KEEP_S": 5.0, "REQUEST_ID": b"a"}
    assert server.requests[0].parameters["triton_enable_empty_final_response"].bool_param
    assert server.half_closed.wait(5), "a finished stream must end without a cancellation"
    assert not server.cancelled.is_set()


def test_many_generations_share_one_channel_and_one_loop(server: FakeServer) -> None:
    server.script = [wait(0.2), *server.script]

    async def run() -> list[Events]:
        async with AsyncClient(server.url, headers={"X-Tenant": "a"}) as client:

            async def one() -> Events:
                return [event async for event in client.generate(b"png", "a cat")]

            return list(await asyncio.gather(*(one() for _ in range(6))))

    threads = threading.active_count()
    assert [len(events) for events in asyncio.run(run())] == [3] * 6
    assert all(metadata["x-tenant"] == "a" for metadata in server.metadata)
    assert threading.active_count() <= threads + 8, "the server's threads; the client has none of its own"


@pytest.mark.parametrize("how", ["aclose", "cancel the task", "close the client"])
def test_leaving_early_cancels_on_the_server(server: FakeServer, how: str) -> None:
    server.script = [step(1, 2), hang()]

    async def run() -> None:
        client = AsyncClient(server.url)
        events = client.generate(b"png", "a cat")
        await anext(events)
        if how == "aclose":
            await events.aclose()
        elif how == "cancel the task":
            task = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await client.close()

    asyncio.run(run())
    assert server.cancelled.wait(5)


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (error("INVALID_ARGUMENT: STEPS must be from 1 to 200, got 0."), InvalidRequest),
        (error("RESOURCE_EXHAUSTED: full"), QueueFull),
        (abort(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE: The server is shutting down."), ServiceUnavailable),
        (final(), MalformedResponse),
        (respond(VIDEO=MP4), MalformedResponse),
    ],
)
def test_errors_are_those_of_the_other_client(
    server: FakeServer, action: Callable[..., Any], kind: type[ClientError]
) -> None:
    server.script = [action]
    with pytest.raises(kind):
        collected(server)


def test_a_silent_stream_is_given_up(server: FakeServer) -> None:
    server.script = [step(1, 2), hang()]
    with pytest.raises(StreamStalled, match=r"Nothing was received from .* for 0.3 s after step 1 of 2"):
        collected(server, idle_timeout_s=0.3)
    assert server.cancelled.wait(5)


def test_nobody_listens() -> None:
    async def run() -> None:
        async with AsyncClient("127.0.0.1:1") as client:
            with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:1 cannot be reached"):
                await anext(client.generate(b"png", "a cat"))
            with pytest.raises(ServerUnreachable):
                await client.quote()
            with pytest.raises(ServerNotReady, match=r"is not ready after 0.3 s"):
                await client.wait_ready(0.3)

    asyncio.run(run())


def test_bad_input_is_refused_before_anything_is_sent(server: FakeServer) -> None:
    async def run() -> None:
        async with AsyncClient(server.url) as client:
            with pytest.raises(InvalidInput, match="There is no option 'sped'"):
                client.generate(b"png", "a cat", sped=3)  # type: ignore[call-arg]
            with pytest.raises(InvalidInput):
                await client.generate_unary(b"", "a cat")
        with pytest.raises(InvalidInput, match="The idle timeout must be more than 0 seconds"):
            AsyncClient(server.url, idle_timeout_s=0.0)

    asyncio.run(run())
    assert server.requests == []


def test_unary_calls_and_their_cancellation(server: FakeServer) -> None:
    async def run() -> Result:
        async with AsyncClient(server.url) as client:
            end = await client.generate_unary(b"png", "a cat")
            server.unary = hang()
            task = asyncio.ensure_future(client.generate_unary(b"png", "a cat"))
            await asyncio.to_thread(server.hanging.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return end

    assert asyncio.run(run()).video == MP4
    assert server.cancelled.wait(5)


def test_questions(server: FakeServer) -> None:
    numbers = {name: np.array([12.5], np.float32) for name in ("SECONDS", "GPU_SECONDS", "PEAK_MEMORY_MIB")}

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            server.unary = respond(**numbers, QUEUE_WAIT_S=np.array([3.0], np.float32), REPORT=b"{}")
            assert (await client.quote(steps=8)).queue_wait_s == 3.0
            assert server.sent() == {"STEPS": 8}
            server.unary = respond(REPORT=json.dumps({"defaults": {"steps": 20}}).encode())
            assert await client.defaults() == {"steps": 20}
            with pytest.raises(MalformedResponse, match="is the server older"):
                await client.offer()
            offer = {"defaults": {"steps": 20}, "limits": {"max_steps": 200}, "presets": ["exact", "fast"]}
            server.unary = respond(REPORT=json.dumps({"accepted": 0, **offer}).encode())
            assert await client.offer() == offer
            with Client(server.url) as other:
                assert other.offer() == offer
            server.unary = lambda *_: cancelled_response()
            assert await client.cancel("job-7") is True
            assert server.requests[-1].model_name == "ti2v_cancel"
            assert server.sent() == {"REQUEST_ID": b"job-7"}

    asyncio.run(run())


def cancelled_response() -> Any:
    """CANCELLED: true."""
    response = respond(REPORT=b"{}")(None, None)  # type: ignore[arg-type]
    response.infer_response.outputs.add(name="CANCELLED", datatype="BOOL", shape=[1])
    response.infer_response.raw_output_contents.append(b"\x01")
    return response


def test_readiness(server: FakeServer) -> None:
    server.ready.clear()

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            assert not await client.is_ready()
            ready = asyncio.ensure_future(client.wait_ready(20.0))
            await asyncio.sleep(0.3)
            server.ready.set()
            await ready
            server.model_ready = False
            assert not await client.is_ready()

    asyncio.run(run())


def test_a_generation_without_an_empty_final_response_is_whole(server: FakeServer) -> None:
    server.script = [result()]
    began_s = time.monotonic()
    [end] = collected(server)
    assert isinstance(end, Result)
    assert time.monotonic() - began_s < 30.0
