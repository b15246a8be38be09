"""Requests that wait: how many may, for how long, and in which order they are answered."""

import time
from contextlib import ExitStack

import numpy as np
import pytest

from stepvideo_serve.config import ServeConfig
from tests.serving.calls import Refused, Server, Stream, Values, until

AT_ONCE_S = 20.0


def taken(server: Server, values: Values, stack: ExitStack) -> Stream | None:
    """A stream whose run has reached the denoiser's queue; None when the request was refused."""
    before = server.executions("dit_denoiser")
    with ExitStack() as attempt:
        stream = attempt.enter_context(server.open(values))
        until(lambda: not stream.silent() or server.executions("dit_denoiser") > before, "the request to be taken")
        if not stream.silent():
            assert stream.refusal().text.startswith("RESOURCE_EXHAUSTED: ")
            return None
        stack.push(attempt.pop_all())
    return stream


def accepted(server: Server, values: Values, stack: ExitStack) -> Stream:
    """Tries until there is room."""
    streams: list[Stream] = []

    def attempt() -> bool:
        stream = taken(server, values, stack)
        streams.extend([] if stream is None else [stream])
        return bool(streams)

    until(attempt, "room in the queue")
    return streams[0]


def timeout(seconds: float) -> Values:
    return {"TIMEOUT_S": np.array([seconds], np.float32)}


def test_more_than_may_wait_are_refused_at_once_and_a_cancelled_one_makes_room(
    server: Server, config: ServeConfig, long: Values, small: Values
) -> None:
    most = config.denoiser.max_queued
    with ExitStack() as stack:
        running = stack.enter_context(server.open(long))
        running.wait_for_step(1)
        before = server.executions("dit_denoiser")
        waiting = [stack.enter_context(server.open(small)) for _ in range(most)]
        until(lambda: server.executions("dit_denoiser") >= before + most, "all to wait")

        began_s = time.monotonic()
        with server.open(small) as stream:
            text = stream.refusal().text
        assert text.startswith(f"RESOURCE_EXHAUSTED: At most {most + 1} requests may run or wait, {most + 1} do")
        with pytest.raises(Refused) as caught:
            server.grpc(small)
        assert caught.value.text.startswith(f"RESOURCE_EXHAUSTED: At most {most} requests may wait, {most} do")
        assert caught.value.status == "UNAVAILABLE"
        assert time.monotonic() - began_s < AT_ONCE_S

        cancelled = waiting.pop(most // 2)
        assert cancelled.silent()
        cancelled.cancel()
        waiting.append(accepted(server, small, stack))

        assert all(stream.silent() for stream in waiting)
        running.wait_for_step(int(running.next()[0]["STEP"][0]) + 2)  # was not disturbed
        running.cancel()
        answers = [stream.collect() for stream in waiting]
    assert all([int(step["STEP"][0]) for step in answer.progress] == [1, 2] for answer in answers)
    assert all(answer.result["SEED"] == [7] for answer in answers)


def test_a_deadline_ends_a_run_at_a_step(server: Server, long: Values) -> None:
    with server.open({**long, **timeout(2.0)}) as stream:
        stream.wait_for_step(1)
        with pytest.raises(Refused) as caught:
            stream.collect()
    assert caught.value.text.startswith("DEADLINE_EXCEEDED: The video must be ready within TIMEOUT_S")
    with pytest.raises(Refused, match="DEADLINE_EXCEEDED: ") as caught:
        server.http({**long, **timeout(1.0)})
    assert caught.value.status == "503"


def test_a_deadline_ends_a_request_that_waits(server: Server, long: Values, small: Values) -> None:
    with server.open(long) as running:
        running.wait_for_step(1)
        with server.open({**small, **timeout(1.0)}) as waiting:
            refused = waiting.refusal()
        assert refused.text.startswith("DEADLINE_EXCEEDED: ")
        assert "while the request waited" in refused.text
        assert running.silent() or "STEP" in running.next()[0]  # still under way


def test_a_deadline_that_is_kept_changes_nothing(server: Server, small: Values) -> None:
    kept = server.grpc({**small, **timeout(3600.0)})
    np.testing.assert_array_equal(kept["LATENTS"], server.grpc(small)["LATENTS"])


@pytest.mark.slow
def test_a_client_that_waits_hears_that_the_server_is_alive(server: Server, long: Values, small: Values) -> None:
    with ExitStack() as stack:
        running = stack.enter_context(server.open(long))
        running.wait_for_step(1)
        waiting = accepted(server, small, stack)
        for beat in (1, 2):
            outputs, final = waiting.next()
            assert not final
            assert (int(outputs["STEP"][0]), int(outputs["TOTAL_STEPS"][0])) == (0, 2)
            assert outputs["ELAPSED_S"][0] >= 14.5 * beat
        running.cancel()
        assert waiting.collect().result["SEED"] == [7]
