import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from stepvideo_client import (
    Client,
    ClientError,
    DeadlineExceeded,
    InvalidInput,
    InvalidRequest,
    MalformedResponse,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    Result,
    ServerFailed,
    ServerUnreachable,
    ServiceUnavailable,
    StepEvent,
    StreamStalled,
)
from tests.client.fake_server import (
    JPEG,
    MP4,
    REPORT,
    FakeServer,
    abort,
    error,
    final,
    hang,
    respond,
    result,
    result_tensors,
    step,
)

LATENTS = np.arange(2 * 4 * 2 * 3, dtype=np.float32).reshape(2, 4, 2, 3)
FRAMES = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)


def last(client: Client, **options: Any) -> Result:
    *_, end = client.generate(b"png", "a cat", **options)
    assert isinstance(end, Result)
    return end


def test_yields_a_step_event_per_step_and_then_the_result(server: FakeServer) -> None:
    with Client(server.url) as client:
        *steps, end = client.generate(b"png", "a cat")
    assert steps == [StepEvent(1, 2, 0.5), StepEvent(2, 2, 1.0)]
    assert isinstance(end, Result)
    assert (end.video, end.seed, end.report) == (MP4, 7, REPORT)
    assert end.frames is None
    assert end.latents is None
    assert end.data == MP4
    assert server.half_closed.wait(5), "a finished stream must end without a cancellation"
    assert not server.cancelled.is_set()


def test_sends_only_what_is_given(server: FakeServer, image: Path) -> None:
    with Client(server.url) as client:
        list(client.generate(image, "一只猫", seed=None))
        request = server.requests[0]
    assert server.sent() == {"PROMPT": "一只猫".encode(), "IMAGE": image.read_bytes()}
    assert request.model_name == "ti2v"
    assert request.parameters["triton_enable_empty_final_response"].bool_param


def test_sends_every_option_with_the_datatype_of_the_interface(server: FakeServer) -> None:
    with Client(server.url) as client:
        last(
            client,
            negative_prompt="blur",
            positive_suffix="sharp",
            num_frames=34,
            height=64,
            width=np.int64(96),
            steps=4,
            cfg_scale=7,
            time_shift=13.0,
            motion_score=2.5,
            seed=2**40,
            latents=LATENTS,
            encode_noise=LATENTS[:1],
            output="latents",
            preview_every=2,
            timeout_s=60.0,
            priority=1,
            request_id="job-7",
        )
    sent = server.sent()
    np.testing.assert_array_equal(sent.pop("LATENTS"), LATENTS)
    np.testing.assert_array_equal(sent.pop("ENCODE_NOISE"), LATENTS[:1])
    assert sent == {
        "PROMPT": b"a cat",
        "IMAGE": b"png",
        "NEGATIVE_PROMPT": b"blur",
        "POSITIVE_SUFFIX": b"sharp",
        "NUM_FRAMES": 34,
        "HEIGHT": 64,
        "WIDTH": 96,
        "STEPS": 4,
        "CFG_SCALE": 7.0,
        "TIME_SHIFT": 13.0,
        "MOTION_SCORE": 2.5,
        "SEED": 2**40,
        "OUTPUT": b"latents",
        "PREVIEW_EVERY": 2,
        "TIMEOUT_S": 60.0,
        "REQUEST_PRIORITY": 1,
        "REQUEST_ID": b"job-7",
    }
    datatypes = {tensor.name: tensor.datatype for tensor in server.requests[0].inputs}
    assert datatypes["SEED"] == "INT64"
    assert datatypes["WIDTH"] == "INT32"
    assert datatypes["CFG_SCALE"] == "FP32"


def test_previews_arrive_with_their_step(server: FakeServer) -> None:
    server.script = [step(1, 2), step(2, 2, PREVIEW=JPEG), result(), final()]
    with Client(server.url) as client:
        events = [event for event in client.generate(b"png", "") if isinstance(event, StepEvent)]
    assert [(event.preview, event.preview_type) for event in events] == [(None, None), (JPEG, "image/jpeg")]


@pytest.mark.parametrize(("name", "array"), [("frames", FRAMES), ("latents", LATENTS)])
def test_array_results_are_the_callers_own(server: FakeServer, name: str, array: np.ndarray[Any, Any]) -> None:
    server.script = [result(**{name.upper(): array}), final()]
    with Client(server.url) as client:
        got = last(client, output=name).data
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, array)
    assert got.dtype == array.dtype
    assert got.flags.writeable


def test_a_result_may_carry_the_final_flag_itself(server: FakeServer) -> None:
    def act(server: FakeServer, context: Any) -> Any:
        response = result()(server, context)
        response.infer_response.parameters["triton_final_response"].bool_param = True
        return response

    server.script = [act]
    with Client(server.url) as client:
        assert last(client).video == MP4
    assert server.half_closed.wait(5)


def test_a_complete_result_is_not_lost_when_the_server_dies_behind_it(server: FakeServer) -> None:
    server.script = [result(), abort(grpc.StatusCode.INTERNAL, "died")]
    with Client(server.url) as client:
        assert last(client).video == MP4


def test_closing_the_iterator_cancels_on_the_server(server: FakeServer) -> None:
    server.script = [step(1, 50), hang()]
    with Client(server.url) as client:
        events = client.generate(b"png", "a cat")
        assert next(events) == StepEvent(1, 50, 0.0)
        events.close()
        assert server.cancelled.wait(5)


def test_an_exception_in_the_loop_cancels_on_the_server(server: FakeServer) -> None:
    server.script = [step(1, 50), hang()]

    def consume(client: Client) -> None:
        for _ in client.generate(b"png", "a cat"):
            raise KeyboardInterrupt

    with Client(server.url) as client:
        with pytest.raises(KeyboardInterrupt):
            consume(client)
        assert server.cancelled.wait(5)


def test_cancelled_streams_leave_no_thread_behind(server: FakeServer) -> None:
    server.script = [step(1, 50), hang()]
    with Client(server.url) as client:
        events = client.generate(b"png", "a cat")
        before = set(threading.enumerate())
        next(events)
        started = set(threading.enumerate()) - before
        events.close()
        assert server.cancelled.wait(5)
    for thread in started:
        if "ThreadPoolExecutor" not in thread.name:  # the server's own
            thread.join(5)
            assert not thread.is_alive(), thread.name
    assert any(thread.name == "stepvideo-client-reader" for thread in started)


def test_closing_the_client_cancels_what_runs(server: FakeServer) -> None:
    server.script = [step(1, 50), hang()]
    client = Client(server.url)
    events = client.generate(b"png", "a cat")
    next(events)
    client.close()
    assert server.cancelled.wait(5)
    with pytest.raises(RequestCancelled):
        next(events)


def test_two_generations_at_once_on_one_client(server: FakeServer) -> None:
    with Client(server.url) as client:
        first, second = client.generate(b"1", "one"), client.generate(b"2", "two")
        assert next(first) == next(second) == StepEvent(1, 2, 0.5)
        assert isinstance(list(first)[-1], Result)
        assert isinstance(list(second)[-1], Result)
    assert {server.sent(0)["PROMPT"], server.sent(1)["PROMPT"]} == {b"one", b"two"}


def test_silence_longer_than_the_idle_timeout_is_an_error(server: FakeServer) -> None:
    server.script = [step(1, 50), hang()]
    with Client(server.url, idle_timeout_s=0.3) as client:
        events = client.generate(b"png", "a cat")
        next(events)
        with pytest.raises(StreamStalled, match=r"Nothing was received from .* for 0\.3 s") as caught:
            next(events)
        assert caught.value.code == "UNAVAILABLE"
        assert server.cancelled.wait(5)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", InvalidRequest),
        ("RESOURCE_EXHAUSTED", QueueFull),
        ("UNAVAILABLE", ServiceUnavailable),
        ("DEADLINE_EXCEEDED", DeadlineExceeded),
        ("CANCELLED", RequestCancelled),
        ("INTERNAL", ServerFailed),
    ],
)
def test_errors_in_the_stream_are_typed_by_their_code(server: FakeServer, code: str, kind: type[ClientError]) -> None:
    server.script = [step(1, 2), error(f"{code}: HEIGHT must be a multiple of 16, got 5: use 16."), final()]
    with Client(server.url) as client, pytest.raises(kind) as caught:
        last(client)
    assert caught.value.code == code
    assert str(caught.value) == "HEIGHT must be a multiple of 16, got 5: use 16."


def test_a_message_of_triton_core_has_no_code(server: FakeServer) -> None:
    text = "[request id: <id_unknown>] expected 2 inputs but got 1 inputs for model 'ti2v'"
    server.script = [error(text), final()]
    with Client(server.url) as client, pytest.raises(RequestFailed) as caught:
        last(client)
    assert (caught.value.code, str(caught.value)) == ("UNKNOWN", text)


def test_a_traceback_from_the_server_is_cut_off(server: FakeServer) -> None:
    first = "Failed to process the request(s) for model 'ti2v_0_0', message: ValueError: boom"
    server.script = [error(f"{first}\n\nAt:\n  model.py(23): execute\n"), final()]
    with Client(server.url) as client, pytest.raises(RequestFailed) as caught:
        last(client)
    assert str(caught.value) == first


def test_a_failed_call_keeps_its_status(server: FakeServer) -> None:
    server.script = [abort(grpc.StatusCode.PERMISSION_DENIED, "no such user")]
    with Client(server.url) as client, pytest.raises(RequestFailed, match="no such user") as caught:
        last(client)
    assert caught.value.code == "PERMISSION_DENIED"


def test_a_refusal_by_a_live_server_is_not_called_unreachable(server: FakeServer) -> None:
    server.script = [abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")]
    with Client(server.url) as client, pytest.raises(ServiceUnavailable, match="Exceeds maximum queue size"):
        last(client)


def test_a_server_that_goes_away_is_unreachable(server: FakeServer) -> None:
    server.script = [step(1, 50), hang()]
    with Client(server.url) as client:
        events = client.generate(b"png", "a cat")
        next(events)
        server.stop()
        with pytest.raises(ServerUnreachable, match="cannot be reached") as caught:
            next(events)
        with pytest.raises(ServerUnreachable):
            last(client)
    assert caught.value.code == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("script", "match"),
    [
        ([step(1, 1), final()], "ended the generation without a result"),
        ([respond(SOMETHING=b"new")], "Expected STEP"),
        ([respond(STEP=np.zeros(2, np.int32))], "STEP must have one element, got 2"),
        ([respond(STEP=np.zeros(1, np.int32))], "TOTAL_STEPS must have one element, got none"),
        ([respond(VIDEO=MP4)], "REPORT must have one element, got none"),
        ([respond(**{**result_tensors(), "REPORT": b"{"})], "cannot be read"),
        ([respond(**{**result_tensors(), "REPORT": b"[]"})], "REPORT must be a JSON object"),
    ],
)
def test_answers_that_make_no_sense_are_errors(server: FakeServer, script: list[Any], match: str) -> None:
    server.script = script
    with Client(server.url) as client, pytest.raises(MalformedResponse, match=match):
        last(client)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"image": Path("missing.png")}, "'missing.png' cannot be read: No such file"),
        ({"image": b""}, "must have 1 to"),
        ({"image": 5}, "must be bytes or the path of a file, got int"),
        ({"prompt": 5}, "prompt must be text, got int"),
        ({"prompt": "\udc80"}, "prompt must be valid Unicode"),
        ({"stepz": 5}, "no option 'stepz'"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": 2**31}, "steps must lie between"),
        ({"seed": 2**63}, "seed must lie between"),
        ({"cfg_scale": "9"}, "cfg_scale must be a number, got str"),
        ({"latents": LATENTS.astype(np.float64)}, "float32 numpy array with 4 dimensions, got float64 with 4"),
        ({"encode_noise": [1.0]}, "got list"),
    ],
)
def test_what_cannot_be_sent_is_refused_at_the_call(server: FakeServer, arguments: dict[str, Any], match: str) -> None:
    with Client(server.url) as client, pytest.raises(InvalidInput, match=match) as caught:
        client.generate(**{"image": b"png", "prompt": "a cat", **arguments})
    assert caught.value.code == "INVALID_ARGUMENT"
    assert server.requests == []


def test_nan_and_infinity_are_left_to_the_server(server: FakeServer) -> None:
    with Client(server.url) as client:
        last(client, cfg_scale=float("nan"), time_shift=1e300)
    assert np.isnan(server.sent()["CFG_SCALE"])
    assert np.isinf(server.sent()["TIME_SHIFT"])
