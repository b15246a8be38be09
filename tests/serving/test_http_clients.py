"""Plain HTTP clients, as curl, browsers' fetch and small scripts are: what they meet, and what docs/clients.md says."""

import gzip
import http.client
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from tests.serving.calls import PATIENCE_S, Refused, Server, Stream, Values, as_array, grpc_request, unary, until

INFER = "/v2/models/ti2v_unary/infer"
HEAD_LENGTH = "Inference-Header-Content-Length"


def body_of(values: Values, outputs: tuple[str, ...] = ()) -> tuple[bytes, int]:
    """The request with binary tensors, and the length of its JSON; all outputs as binary data, or those named."""
    inputs, raw = [], b""
    for name, value in values.items():
        array = as_array(value)
        data = serialize_byte_tensor(array).item() if array.dtype == np.object_ else array.tobytes()
        shape = {"shape": list(array.shape), "datatype": np_to_triton_dtype(array.dtype)}
        inputs.append({"name": name, **shape, "parameters": {"binary_data_size": len(data)}})
        raw += data
    head: dict[str, Any] = {"inputs": inputs}
    if outputs:
        head["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    else:
        head["parameters"] = {"binary_data_output": True}
    text = json.dumps(head).encode()
    return text + raw, len(text)


def connection(server: Server) -> "closing[http.client.HTTPConnection]":
    return closing(http.client.HTTPConnection(server.http_url, timeout=PATIENCE_S))


def post(server: Server, values: Values, outputs: tuple[str, ...] = ()) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and content of the response."""
    body, head_length = body_of(values, outputs)
    return send(server, body, head_length, {})


def send(
    server: Server, body: bytes | Iterator[bytes], head_length: int, headers: Mapping[str, str]
) -> tuple[int, Mapping[str, str], bytes]:
    """As post, with a body and headers as they are; a body in pieces goes in chunks."""
    with connection(server) as line:
        sent = {HEAD_LENGTH: str(head_length), **headers}
        line.request("POST", INFER, body, sent, encode_chunked=not isinstance(body, bytes))
        response = line.getresponse()
        return response.status, dict(response.getheaders()), response.read()


def binary_of(headers: Mapping[str, str], content: bytes) -> dict[str, bytes]:
    """The binary outputs by name."""
    at = int(headers[HEAD_LENGTH])
    found = {}
    for output in json.loads(content[:at])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]] = content[at : at + size]
        at += size
    assert at == len(content)
    return found


def test_a_large_result_comes_whole_as_binary_data(server: Server, small: Values) -> None:
    size = {"NUM_FRAMES": 102, "HEIGHT": 112, "WIDTH": 128, "STEPS": 1}
    numbers = {name: np.array([value], np.int32) for name, value in size.items()}
    large: Values = {**small, **numbers, "OUTPUT": b"frames", "REQUEST_ID": b"large-over-http"}
    frames = server.grpc(large)["FRAMES"]
    assert frames.nbytes > 4 << 20, "more than gRPC takes by itself"
    status, headers, content = post(server, large, ("FRAMES",))
    assert status == http.client.OK
    assert binary_of(headers, content)["FRAMES"] == frames.tobytes()


def test_a_result_that_was_not_asked_for_is_refused_before_the_work(server: Server, long: Values) -> None:
    """A run of hours: it would not end while this test waits."""
    for model in ("ti2v", "ti2v_unary"):
        with pytest.raises(Refused, match=r"INVALID_ARGUMENT: The outputs asked for must have LATENTS, .* got FRAMES"):
            ask_for(server, model, long, ("FRAMES", "SEED"))
    status, _, content = post(server, long, ("VIDEO",))
    assert (status, b"must have LATENTS, because OUTPUT is latents, got VIDEO" in content) == (400, True)


def ask_for(server: Server, model: str, values: Values, outputs: tuple[str, ...]) -> None:
    """A gRPC stream, or a unary call, with outputs asked for by name. Raises Refused."""
    request = grpc_request(model, values)
    for name in outputs:
        request.outputs.add(name=name)
    if model == "ti2v_unary":
        unary(server.grpc_url, request)
        return
    with Stream(server.grpc_url, request) as stream:
        stream.next()


def test_who_asks_for_no_result_has_what_was_asked_for(server: Server, small: Values) -> None:
    status, headers, content = post(server, small, ("SEED",))
    assert status == http.client.OK
    assert binary_of(headers, content) == {"SEED": (7).to_bytes(8, "little")}


def test_bodies_may_be_compressed_both_ways(server: Server, small: Values) -> None:
    """As proxies and libraries ask for by themselves; the length of the JSON is that before compression."""
    plain = binary_of(*post(server, small)[1:])["LATENTS"]
    body, head_length = body_of(small)
    status, headers, content = send(
        server, gzip.compress(body), head_length, {"Content-Encoding": "gzip", "Accept-Encoding": "gzip, deflate"}
    )
    assert (status, headers["Content-Encoding"]) == (http.client.OK, "gzip")
    assert binary_of(headers, gzip.decompress(content))["LATENTS"] == plain


def test_a_body_may_come_in_chunks(server: Server, small: Values) -> None:
    body, head_length = body_of(small)
    pieces = iter([body[:1000], body[1000:]])
    status, headers, content = send(server, pieces, head_length, {"Transfer-Encoding": "chunked"})
    assert status == http.client.OK
    assert "LATENTS" in binary_of(headers, content)


def test_a_caller_that_left_finds_its_run_again(server: Server, long: Values) -> None:
    """HTTP tells the server of no caller that leaves; with a REQUEST_ID nothing is computed twice."""
    named: Values = {**long, "STEPS": np.array([12], np.int32), "REQUEST_ID": uuid.uuid4().hex.encode()}
    body, head_length = body_of(named)
    begun = server.executions("vae_encoder")
    with connection(server) as line:
        line.request("POST", INFER, body, {HEAD_LENGTH: str(head_length)})
        until(lambda: server.executions("vae_encoder") > begun, "the run to begin")
    status, headers, content = post(server, named)
    assert status == http.client.OK
    assert server.executions("vae_encoder") == begun + 1
    expected = server.grpc({**named, "REQUEST_ID": uuid.uuid4().hex.encode()})["LATENTS"]
    assert binary_of(headers, content)["LATENTS"] == expected.tobytes()
