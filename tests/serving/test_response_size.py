"""MAX_RESPONSE_BYTES: what cannot be received is refused, before the work where that is possible."""

import time

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2_grpc

from stepvideo_serve.request.response_size import MESSAGE_BYTES, response_bytes
from tests.serving.calls import PATIENCE_S, Refused, Server, Values, grpc_request, outputs_of, report_of

GRPC_DEFAULT = 4 << 20
SOON_S = 2.0


def bound(most: int) -> Values:
    return {"MAX_RESPONSE_BYTES": np.array([most], np.int64)}


@pytest.mark.parametrize("output", [b"mp4", b"frames", b"latents"])
def test_the_size_of_a_message_is_known(server: Server, small: Values, output: bytes) -> None:
    with server.grpc_call({**small, "OUTPUT": output}) as call:
        message = call.result()
    stated = response_bytes(outputs_of(message))
    assert stated - MESSAGE_BYTES < message.ByteSize() <= stated


def test_a_client_with_the_default_limit_is_refused_before_the_work(server: Server, long: Values) -> None:
    """Without the bound, this client loses the result after the work."""
    size = {"NUM_FRAMES": 102, "HEIGHT": 128, "WIDTH": 128, "STEPS": 1}
    large: Values = {**long, **{name: np.array([value], np.int32) for name, value in size.items()}, "OUTPUT": b"frames"}
    executed = server.executions("text_encoder")
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = grpc_request("ti2v_unary", {**large, **bound(GRPC_DEFAULT)})
        began_s = time.monotonic()
        with pytest.raises(grpc.RpcError, match=r"MAX_RESPONSE_BYTES = 4194304, but takes at least 501[3-9]"):
            stub.ModelInfer(request, timeout=PATIENCE_S)
        assert time.monotonic() - began_s < SOON_S
        assert server.executions("text_encoder") == executed
        smaller = {**large, "NUM_FRAMES": np.array([34], np.int32), **bound(GRPC_DEFAULT)}
        outputs = outputs_of(stub.ModelInfer(grpc_request("ti2v_unary", smaller), timeout=PATIENCE_S))
    assert outputs["FRAMES"].shape == (34, 128, 128, 3)


@pytest.mark.parametrize("output", [b"frames", b"latents"])
def test_an_array_is_taken_or_refused_at_the_byte(server: Server, small: Values, output: bytes) -> None:
    request: Values = {**small, "OUTPUT": output}
    with pytest.raises(Refused, match="takes at least ") as refused:
        server.grpc({**request, **bound(1000)})
    least = int(refused.value.text.split("takes at least ")[1].split(" ")[0])
    with pytest.raises(Refused, match=f"takes at least {least} bytes"):
        server.grpc({**request, **bound(least - 1)})
    took = response_bytes(server.grpc(request))
    assert least <= took < least + 1024, "the least is close to what it takes"
    assert server.grpc({**request, **bound(took + 64)})["SEED"] == [7]  # seconds in REPORT differ in length


@pytest.mark.parametrize("model", ["ti2v", "ti2v_unary"])
def test_an_mp4_that_is_too_large_is_kept_for_who_can_take_it(server: Server, small: Values, model: str) -> None:
    request: Values = {**small, "OUTPUT": b"mp4", "REQUEST_ID": f"large-{model}".encode()}

    def ask(extra: Values) -> "dict[str, np.ndarray]":  # type: ignore[type-arg]
        values = {**request, **extra}
        return dict(server.stream_result(values) if model == "ti2v" else server.grpc(values, model))

    with pytest.raises(Refused, match=r"INVALID_ARGUMENT: .*MAX_RESPONSE_BYTES = 3000, but takes \d+ bytes"):
        ask(bound(3000))
    executed = server.executions("text_encoder")
    result = ask({})
    assert report_of(result)["repeated"] is True
    assert server.executions("text_encoder") == executed, "nothing was computed again"
    assert result["VIDEO"][0] == server.grpc({**small, "OUTPUT": b"mp4"})["VIDEO"][0]
    size, ended = response_bytes(result), server.executions("text_encoder")
    assert ask(bound(size))["VIDEO"][0] == result["VIDEO"][0]
    with pytest.raises(Refused, match=f"takes {size} bytes"):
        ask(bound(size - 1))
    assert server.executions("text_encoder") == ended, "nor later"


@pytest.mark.parametrize("most", [0, -(2**63), 2**63 - 1])
def test_bounds_that_make_no_sense(server: Server, small: Values, most: int) -> None:
    with pytest.raises(Refused, match="MAX_RESPONSE_BYTES must be from 1 to 1099511627776 bytes, got "):
        server.grpc({**small, **bound(most)})
