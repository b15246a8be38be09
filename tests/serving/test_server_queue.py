"""Requests that wait: how many may, for how long, and in which order they are answered."""

import time
from contextlib import ExitStack

import numpy as np
import pytest

from stepvideo_serve.config import ServeConfig
from tests.serving.calls import Refused, Server, Stream, Values, until

AT_ONCE_S = 20.0


def taken(server: Server, values: Values, stack: ExitStack) -> Stream | None:
    """A stream whose run waits in the denoiser's queue; None when the request was refused."""
    with ExitStack() as attempt:
        stream = attempt.enter_context(server.open(values))
        refusal = None
        try:
            assert "QUEUE_POSITION" in stream.next()[0]
        except Refused as error:
            refusal = error.text
        if refusal is not None:
            assert refusal.startswith("RESOURCE_EXHAUSTED: ")
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


def prioritised(values: Values, priority: int) -> Values:
    return {**values, "REQUEST_PRIORITY": np.array([priority], np.int32)}


def test_more_than_may_wait_are_refused_at_once_and_a_cancelled_one_makes_room(
    server: Server, config: ServeConfig, long: Values, small: Values
) -> None:
    most = config.denoiser.max_queued
    with ExitStack() as stack:
        running = stack.enter_context(server.open(long))
        running.wait_for_step(1)
        waiting = [stack.enter_context(server.open(small)) for _ in range(most)]
        until(lambda: server.waiting() == most, "all to wait")

        began_s = time.monotonic()
        with server.open(small) as stream:
            text = stream.refusal().text
        assert text.startswith(f"RESOURCE_EXHAUSTED: At most {most + 1} requests may run or wait, {most + 1} do")
        with pytest.raises(Refused) as caught:
            server.grpc(small)
        assert caught.value.text.startswith(f"RESOURCE_EXHAUSTED: At most {most} requests may wait, {most} do")
        assert caught.value.status == "UNAVAILABLE"
        assert time.monotonic() - began_s < AT_ONCE_S

        waiting.pop(most // 2).cancel()
        waiting.append(accepted(server, small, stack))

        running.wait_for_step(int(running.next()[0]["STEP"][0]) + 2)  # was not disturbed
        running.cancel()
        answers = [stream.collect() for stream in waiting]
    assert all([int(step["STEP"][0]) for step in answer.progress] == [1, 2] for answer in answers)
    assert all(answer.result["SEED"] == [7] for answer in answers)


def test_a_deadline_ends_a_run_at_a_step(server: Server, long: Values) -> None:
    """One that seemed to have time enough, until another one went first."""
    fifteen_steps = {**long, "STEPS": np.array([15], np.int32)}
    began_s = time.monotonic()
    server.stream(fifteen_steps)  # and now the server knows its pace
    takes_s = time.monotonic() - began_s
    with server.open({**prioritised(fifteen_steps, 3), **timeout(1.6 * takes_s)}) as late:
        late.wait_for_step(2)
        server.stream(prioritised(fifteen_steps, 1))
        with pytest.raises(Refused) as caught:
            late.collect()
    assert caught.value.text.startswith("DEADLINE_EXCEEDED: The video must be ready within TIMEOUT_S")


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(server: Server, long: Values, small: Values) -> None:
    with server.open(long) as running:
        running.wait_for_step(1)
        began_s = time.monotonic()
        with server.open({**small, **timeout(3600.0)}) as stream:
            refused = stream.refusal()
        assert time.monotonic() - began_s < AT_ONCE_S
        assert refused.text.startswith("DEADLINE_EXCEEDED: The video must be ready within TIMEOUT_S, of which ")
        assert "of waiting" in refused.text
    with pytest.raises(Refused, match="DEADLINE_EXCEEDED: ") as caught:
        server.http({**long, **timeout(1.0)})
    assert caught.value.status == "503"


def test_a_deadline_that_is_kept_changes_nothing(server: Server, small: Values) -> None:
    expected = server.grpc(small)["LATENTS"]  # also waits for the end of what was cancelled before
    np.testing.assert_array_equal(server.grpc({**small, **timeout(3600.0)})["LATENTS"], expected)


def test_a_higher_priority_parks_the_run_under_way_which_ends_with_the_same_bits(
    server: Server, long: Values, small: Values
) -> None:
    twelve_steps = {**long, "STEPS": np.array([12], np.int32)}
    undisturbed = server.stream(twelve_steps)
    with server.open(prioritised(twelve_steps, 3)) as low:
        low.wait_for_step(3)
        urgent = server.stream(prioritised(small, 1))
        rest = low.collect()
    assert urgent.result["SEED"] == [7]
    assert [int(outputs["QUEUE_POSITION"][0]) for outputs in rest.waits] == [1], "it waited while the other one ran"
    assert int(rest.waits[0]["STEP"][0]) >= 3
    steps = [int(step["STEP"][0]) for step in rest.progress]
    assert steps == list(range(4, 13))
    np.testing.assert_array_equal(rest.result["LATENTS"], undisturbed.result["LATENTS"])


def test_those_that_wait_hear_their_place_and_run_by_priority(server: Server, long: Values, small: Values) -> None:
    with ExitStack() as stack:
        running = stack.enter_context(server.open(prioritised(long, 1)))
        running.wait_for_step(2)
        low = stack.enter_context(server.open(prioritised({**small, "SEED": np.array([3], np.int64)}, 3)))
        first, _ = low.next()
        assert (int(first["STEP"][0]), int(first["QUEUE_POSITION"][0])) == (0, 1)
        assert first["START_IN_S"][0] > 60.0, "the run before it has a hundred thousand steps"
        normal = stack.enter_context(server.open(small))
        assert int(normal.next()[0]["QUEUE_POSITION"][0]) == 1
        assert int(low.next()[0]["QUEUE_POSITION"][0]) == 2
        running.cancel()
        before = normal.collect()
        assert before.result["SEED"] == [7]
        assert low.collect().result["SEED"] == [3]


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
