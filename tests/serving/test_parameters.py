"""Triton's own request parameters: `probe`, `timeout` and `priority`."""

from typing import Any

import numpy as np
import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from tests.serving.calls import PATIENCE_S, Outputs, Refused, Server, Values, grpc_request, unary

PARAMETER_OF = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}


def call_with(server: Server, values: Values, model: str = "ti2v_unary", **parameters: Any) -> Outputs:
    """A unary gRPC request with these parameters."""
    request = grpc_request(model, values)
    for name, value in parameters.items():
        setattr(request.parameters[name], PARAMETER_OF[type(value)], value)
    return unary(server.grpc_url, request)


def seconds(value: float) -> Values:
    return {"TIMEOUT_S": np.array([value], np.float32)}


def test_a_probe_is_one_where_it_is_true(server: Server, small: Values) -> None:
    nothing: Values = {"PROMPT": b"", "IMAGE": b""}
    assert "LATENTS" not in call_with(server, nothing, probe=True)
    assert call_with(server, small, probe=False)["SEED"] == [7]


@pytest.mark.parametrize("model", ["ti2v_unary", "text_encoder"])
@pytest.mark.parametrize("value", ["false", 0, 1.5])
def test_a_probe_that_is_neither_true_nor_false_is_refused(
    server: Server, small: Values, model: str, value: object
) -> None:
    values = small if model == "ti2v_unary" else {"PROMPT": small["PROMPT"]}
    with pytest.raises(Refused, match=r"^INVALID_ARGUMENT: .*: The parameter probe must be true or false, got ") as no:
        call_with(server, values, model, probe=value)
    assert no.value.status == "INVALID_ARGUMENT"


def test_the_servers_own_timeout_is_a_deadline(server: Server, long: Values) -> None:
    with pytest.raises(Refused, match=r"DEADLINE_EXCEEDED: The video must be ready within TIMEOUT_S"):
        call_with(server, long, timeout=1_500_000)


def test_of_two_deadlines_the_shorter_holds(server: Server, long: Values) -> None:
    for own_s, timeout_us in ((1.5, 600_000_000), (600.0, 1_500_000)):
        with pytest.raises(Refused, match="DEADLINE_EXCEEDED"):
            call_with(server, {**long, **seconds(own_s)}, timeout=timeout_us)


def test_a_timeout_beyond_the_limits_is_refused_as_timeout_s_is(server: Server, small: Values) -> None:
    with pytest.raises(Refused, match="TIMEOUT_S must be above 0 and at most 86400 seconds, got 90000"):
        call_with(server, small, timeout=90_000_000_000)


def test_a_malformed_timeout_s_is_refused_whatever_the_parameter(server: Server, small: Values) -> None:
    with pytest.raises(Refused, match="TIMEOUT_S must be a finite number, got nan"):
        call_with(server, {**small, **seconds(float("nan"))}, timeout=60_000_000)


def test_enough_time_changes_nothing(server: Server, small: Values) -> None:
    plain = server.grpc(small)
    timed = call_with(server, small, timeout=60_000_000, priority=1)
    assert (timed["LATENTS"] == plain["LATENTS"]).all()


def test_http_has_the_timeout_too(server: Server, long: Values) -> None:
    inputs = []
    for name, value in long.items():
        array = np.array([value], np.object_) if isinstance(value, bytes) else value
        kind = {"O": "BYTES", "i": f"INT{8 * array.itemsize}"}[array.dtype.kind]
        inputs.append(tritonclient.http.InferInput(name, list(array.shape), kind).set_data_from_numpy(array))
    with (
        tritonclient.http.InferenceServerClient(server.http_url, network_timeout=PATIENCE_S) as client,
        pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"),
    ):
        client.infer("ti2v_unary", inputs, timeout=1_500_000)
