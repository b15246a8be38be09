"""REQUEST_ID on the real server: a repeat gets the run under way, or the result of the one that has ended."""

import re
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import grpc
import numpy as np
import pytest

from stepvideo_serve.launch.server import TritonServer
from tests.serving.calls import Outputs, Refused, Server, Values, outputs_of, report_of, until

REPEATS: dict[str, Callable[[Server, Values], Outputs]] = {"grpc": Server.grpc, "http": Server.http}


@pytest.fixture
def request_id() -> bytes:
    """One that no other test has."""
    return f"test-{uuid.uuid4()}".encode()


@pytest.fixture
def named(small: Values, request_id: bytes) -> Values:
    """The small request, to be repeated."""
    return {**small, "REQUEST_ID": request_id}


@pytest.fixture
def twelve_steps(long: Values, request_id: bytes) -> Values:
    """A request of some seconds, to be repeated."""
    return {**long, "STEPS": np.array([12], np.int32), "REQUEST_ID": request_id}


def runs_of(server: Server) -> int:
    """How many requests have begun: each has its image encoded."""
    return server.executions("vae_encoder")


def is_repeated(outputs: Outputs) -> bool:
    return report_of(outputs).get("repeated", False) is True


def same_result(outputs: Outputs, others: Outputs) -> bool:
    """The same bits, and the same report but for `repeated`."""
    first, second = ({**report_of(each), "repeated": None} for each in (outputs, others))
    assert outputs.keys() == others.keys()
    tensors = outputs.keys() - {"REPORT"}
    return first == second and all(np.array_equal(outputs[name], others[name]) for name in tensors)


def test_a_repeat_joins_the_run_under_way(server: Server, twelve_steps: Values) -> None:
    begun = runs_of(server)
    with server.open(twelve_steps) as first:
        first.wait_for_step(2)
        with server.open({**twelve_steps, "PREVIEW_EVERY": np.array([1], np.int32)}) as second:
            at_once, _ = second.next()
            assert int(at_once["STEP"][0]) >= 2, "it hears how far the run is"
            results = [stream.collect() for stream in (first, second)]
    assert runs_of(server) == begun + 1
    assert [int(step["STEP"][0]) for step in results[1].progress][-1] == 12
    assert len(results[1].progress) >= 8
    assert [is_repeated(answer.result) for answer in results] == [False, True]
    assert same_result(results[0].result, results[1].result)
    assert all(answer.ended_empty for answer in results)


def test_a_repeat_afterwards_has_the_result_at_once(server: Server, named: Values) -> None:
    named = {**named, "OUTPUT": b"mp4"}
    first = server.stream(named)
    begun = runs_of(server)
    again = server.stream({**named, "TIMEOUT_S": np.array([0.5], np.float32)})
    assert again.progress == []
    assert again.ended_empty
    assert [is_repeated(answer.result) for answer in (first, again)] == [False, True]
    assert same_result(first.result, again.result)
    assert runs_of(server) == begun


@pytest.mark.parametrize("way", REPEATS.values(), ids=REPEATS.keys())
def test_unary_calls_share_results_too_but_not_with_streams(
    server: Server, named: Values, way: Callable[[Server, Values], Outputs]
) -> None:
    streamed = server.stream_result(named)
    first, again = server.grpc(named), way(server, named)
    assert [is_repeated(outputs) for outputs in (streamed, first, again)] == [False, False, True]
    assert same_result(first, again)
    np.testing.assert_array_equal(first["LATENTS"], streamed["LATENTS"])


def test_unary_calls_join_the_run_under_way(server: Server, twelve_steps: Values) -> None:
    begun = runs_of(server)
    with ExitStack() as stack:
        calls = [stack.enter_context(server.grpc_call(twelve_steps)) for _ in range(4)]
        results = [outputs_of(call.result()) for call in calls]
    assert runs_of(server) == begun + 1
    assert sorted(is_repeated(outputs) for outputs in results) == [False, True, True, True]
    assert all(same_result(outputs, results[0]) for outputs in results[1:])


def test_without_a_seed_a_repeat_has_the_seed_of_the_first(server: Server, named: Values) -> None:
    unseeded = {name: value for name, value in named.items() if name != "SEED"}
    first, again = server.stream_result(unseeded), server.stream_result(unseeded)
    assert same_result(first, again)


def test_the_same_id_with_other_inputs_is_refused(server: Server, twelve_steps: Values, named: Values) -> None:
    def refused(values: Values) -> None:
        with server.open(values) as stream:
            text = stream.refusal().text
        assert text.startswith("INVALID_ARGUMENT: REQUEST_ID 'test-"), text

    with server.open(twelve_steps) as running:
        running.wait_for_step(1)
        refused({**twelve_steps, "SEED": np.array([8], np.int64)})
        assert running.collect().result["SEED"] == [7], "which did not disturb it"
    refused({**twelve_steps, "PROMPT": b"a dog"})
    server.grpc({**named, "REQUEST_ID": b"unary-" + as_bytes(named["REQUEST_ID"])})
    with pytest.raises(Refused, match="INVALID_ARGUMENT: REQUEST_ID") as caught:
        server.http(
            {**named, "REQUEST_ID": b"unary-" + as_bytes(named["REQUEST_ID"]), "STEPS": np.array([3], np.int32)}
        )
    assert caught.value.status == "400"


def as_bytes(value: Any) -> bytes:
    assert isinstance(value, bytes)
    return value


def test_one_that_cancels_leaves_the_other_its_run(server: Server, twelve_steps: Values) -> None:
    begun = runs_of(server)
    with server.open(twelve_steps) as first:
        first.wait_for_step(1)
        with server.open(twelve_steps) as second:
            second.next()
            first.cancel()
            answer = second.collect()
    assert [int(step["STEP"][0]) for step in answer.progress][-1] == 12
    assert is_repeated(answer.result)
    assert runs_of(server) == begun + 1


def test_a_unary_call_that_is_cancelled_leaves_the_other_its_run(server: Server, twelve_steps: Values) -> None:
    taken = server.executions("ti2v_unary")
    with server.grpc_call(twelve_steps) as first, server.grpc_call(twelve_steps) as second:
        until(lambda: server.executions("ti2v_unary") >= taken + 2, "both to be taken")
        first.cancel()
        assert outputs_of(second.result())["SEED"] == [7]
        assert first.code() is grpc.StatusCode.CANCELLED


def test_the_last_one_to_leave_ends_the_run(server: Server, long: Values, small: Values, request_id: bytes) -> None:
    values = {**long, "REQUEST_ID": request_id}
    with server.open(values) as first, server.open(values) as second:
        first.wait_for_step(1)
        second.wait_for_step(1)
        first.cancel()
        second.cancel()
    assert server.grpc(small)["SEED"] == [7], "the run of hours has ended"


def test_a_failure_is_not_kept(server: Server, long: Values, small: Values, request_id: bytes) -> None:
    server.stream({**long, "STEPS": np.array([4], np.int32)})  # and now the server knows its pace
    too_short = {**long, "REQUEST_ID": request_id, "TIMEOUT_S": np.array([60.0], np.float32)}
    for _ in range(2):
        with server.open(too_short) as stream:
            text = stream.refusal().text
        assert text.startswith("DEADLINE_EXCEEDED: ")
    with server.open({**long, "REQUEST_ID": request_id}) as stream:
        stream.wait_for_step(2)
    assert server.grpc(small)["SEED"] == [7]


def test_unary_requests_run_side_by_side(server: Server, long: Values, small: Values) -> None:
    """More than there were instances, and one of high priority goes first."""
    with ExitStack() as stack:
        calls = [stack.enter_context(server.grpc_call(long)) for _ in range(4)]
        urgent = server.grpc({**small, "REQUEST_PRIORITY": np.array([1], np.int32)})
        assert urgent["SEED"] == [7]
        assert not any(call.done() for call in calls)
        for call in calls:
            call.cancel()
    assert server.grpc(small)["SEED"] == [7]


def encodings(triton: TritonServer) -> dict[tuple[str, str], float]:
    """How many were computed and how many taken from a cache, since the start, by cache."""
    with urllib.request.urlopen(triton.metrics_url) as answer:
        lines = answer.read().decode().splitlines()
    found = (re.fullmatch(r'stepvideo_cache_(hits|misses)_total\{cache="(\w+)"\} (\S+)', line) for line in lines)
    return {(entry[1], entry[2]): float(entry[3]) for entry in found if entry is not None}


def test_an_image_and_a_prompt_are_encoded_once_whatever_the_seed(
    server: Server, triton: TritonServer, small: Values
) -> None:
    unseen = {**small, "PROMPT": "此提示词独一无二".encode(), "HEIGHT": np.array([80], np.int32)}
    counts = [encodings(triton)]
    for seed in (1, 2):
        server.stream_result({**unseen, "SEED": np.array([seed], np.int64)})
        counts.append(encodings(triton))
    first, second = ({key: after[key] - before[key] for key in after} for before, after in pairwise(counts))
    assert (first["misses", "image"], first["hits", "image"]) == (1, 0)
    assert first["misses", "text"] >= 1
    assert second == {("misses", "image"): 0, ("hits", "image"): 1, ("misses", "text"): 0, ("hits", "text"): 2}


def test_a_caller_does_not_learn_whether_a_prompt_was_used_before(server: Server, small: Values) -> None:
    """REPORT of a prompt and an image that are new, and of one that somebody else has sent: equal but for seconds."""
    unseen = {**small, "PROMPT": "谁也没有用过的提示词".encode(), "HEIGHT": np.array([96], np.int32)}
    answers = [server.stream_result(unseen) for _ in range(2)] + [server.grpc(unseen)]
    new, *known = ({**report_of(answer), "seconds": None, "step_seconds": None} for answer in answers)
    assert "cached" not in new
    for report in known:
        assert report == new
    assert len({tuple(sorted(answer)) for answer in answers}) == 1, "nor by another output"


def test_a_cached_image_gives_the_same_latent(server: Server) -> None:
    normal = np.random.default_rng(5).standard_normal
    pixels, noise = (normal(shape).clip(-1, 1).astype(np.float32) for shape in ((3, 32, 48), (8, 2, 3)))
    first, again = (server.grpc({"PIXELS": pixels, "NOISE": noise}, "vae_encoder") for _ in range(2))
    assert (bool(first["CACHED"][0]), bool(again["CACHED"][0])) == (False, True)
    np.testing.assert_array_equal(first["LATENT"], again["LATENT"])
    other = server.grpc({"PIXELS": pixels, "NOISE": -noise}, "vae_encoder")
    assert bool(other["CACHED"][0])
    assert not np.array_equal(other["LATENT"], first["LATENT"])
    pixels[0, 0, 0] += 0.1
    assert not server.grpc({"PIXELS": pixels, "NOISE": noise}, "vae_encoder")["CACHED"][0]
