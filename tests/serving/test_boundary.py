"""Who may call the internal models: the models of this server, and nobody outside, by any way in."""

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from stepvideo_serve.errors import InvalidRequest, SetupError
from stepvideo_serve.launch.boundary import INTERNAL_MODELS, PARAMETER, VARIABLE, Boundary, new_token
from stepvideo_serve.launch.install import server_environment
from stepvideo_serve.launch.leftovers import SHARED_MEMORY
from stepvideo_serve.launch.options import GRPC_OPERATOR_HEADER, OPERATOR_HEADER
from stepvideo_serve.launch.server import TritonServer
from tests.serving.calls import Refused, Server, Values, http_inputs, report_of
from tests.serving.test_crashes import NOISE, PIXELS, RUN, settings

LATENTS = np.zeros((3, 8, 2, 2), np.float32)
REFUSAL = "INVALID_ARGUMENT: The caller of {} must be a model of this server, got a request from outside"

# What each internal model would do if it were asked from inside.
REQUESTS: dict[str, tuple[str, Values]] = {
    "text": ("text_encoder", {"PROMPT": b"a cat"}),
    "encode": ("vae_encoder", {"PIXELS": PIXELS, "NOISE": NOISE}),
    "denoise": ("dit_denoiser", RUN),
    "ranks-decode": ("dit_denoiser", {"RUN_ID": b"b", "KIND": b"decode", "latents": RUN["latents"]}),
    "ranks-text": ("dit_denoiser", {"RUN_ID": b"b", "KIND": b"text", "input_ids": np.ones((1, 3), np.int64)}),
    "note": ("dit_denoiser", {"KIND": b"note", "NOTE": b'{"step": [1e15, 1e200]}'}),
    "pace": ("dit_denoiser", {"KIND": b"pace"}),
    "fetch": ("dit_denoiser", {"NEXT_OF": b"b"}),
    "cancel": ("dit_denoiser", {"CANCEL_RUN": b"b"}),
    "malformed": ("dit_denoiser", {"RUN_ID": b"b", "SETTINGS": settings(steps=0)}),
    "decode": ("vae_decoder", {"RUN_ID": b"b", "latents": RUN["latents"]}),
    "decoder-fetch": ("vae_decoder", {"NEXT_OF": b"b"}),
    "decoder-cancel": ("vae_decoder", {"CANCEL_RUN": b"b"}),
}
ASKED = pytest.mark.parametrize(("model", "values"), REQUESTS.values(), ids=REQUESTS.keys())


@pytest.fixture(scope="module")
def outside(server: Server) -> Server:
    """The same server, called as everybody may."""
    return replace(server, inside=False)


@pytest.fixture(autouse=True, scope="module")
def nothing_changed(server: Server, small: Values) -> Iterator[None]:
    """The ledger is what it was after all that was refused, and requests are answered as before."""
    before = server.grpc(small)["LATENTS"]
    stages = pace(server)["rates"]
    yield
    assert pace(server)["rates"] == stages
    np.testing.assert_array_equal(server.grpc(small)["LATENTS"], before)


def pace(server: Server) -> dict[str, Any]:
    return report_of(server.grpc({"KIND": b"pace"}, "dit_denoiser"))


@ASKED
def test_refused_over_grpc(outside: Server, model: str, values: Values) -> None:
    with pytest.raises(Refused) as refused:
        outside.grpc(values, model)
    assert refused.value.text.startswith(REFUSAL.format(model))
    assert refused.value.status == "INVALID_ARGUMENT"


@ASKED
def test_refused_over_http(outside: Server, model: str, values: Values) -> None:
    with pytest.raises(Refused) as refused:
        outside.http(values, model)
    assert refused.value.text.startswith(REFUSAL.format(model))


@ASKED
def test_refused_on_a_stream(outside: Server, model: str, values: Values) -> None:
    with outside.open(values, model) as stream, pytest.raises(Refused) as refused:
        stream.next()
    assert refused.value.text.startswith(REFUSAL.format(model))


# Inputs of each internal model, all from shared memory; the bytes of the first come first.
TENSORS: dict[str, tuple[int, dict[str, tuple[list[int], str]]]] = {
    "text_encoder": (4, {"PROMPT": ([1], "BYTES")}),
    "vae_encoder": (PIXELS.nbytes, {"PIXELS": ([3, 32, 32], "FP32"), "NOISE": ([8, 2, 2], "FP32")}),
    "dit_denoiser": (LATENTS.nbytes, {"latents": ([3, 8, 2, 2], "FP32")}),
    "vae_decoder": (LATENTS.nbytes, {"latents": ([3, 8, 2, 2], "FP32")}),
}


@pytest.fixture
def region() -> Iterator[SharedMemory]:
    """Shared memory of a caller on this machine, all zeros."""
    memory = SharedMemory(create=True, size=1 << 16)
    yield memory
    memory.close()
    memory.unlink()


def from_region(library: Any, model: str) -> list[Any]:
    """The inputs of a request, all of whose tensors are in the region "boundary"."""
    size, tensors = TENSORS[model]
    inputs = [library.InferInput(name, shape, kind) for name, (shape, kind) in tensors.items()]
    for tensor, length in zip(inputs, (size, NOISE.nbytes), strict=False):
        tensor.set_shared_memory("boundary", length)
    return inputs


@pytest.mark.parametrize("model", INTERNAL_MODELS)
@pytest.mark.parametrize(
    ("library", "header"), [(tritonclient.grpc, GRPC_OPERATOR_HEADER), (tritonclient.http, OPERATOR_HEADER)]
)
def test_refused_from_shared_memory_even_of_an_operator(
    triton: TritonServer, region: SharedMemory, model: str, library: Any, header: str
) -> None:
    """Only an operator can register a region; who is one is no model of this server."""
    [key] = triton.options.security.operator_headers.values()
    url = triton.grpc_url if library is tritonclient.grpc else triton.http_url
    with library.InferenceServerClient(url) as client:
        given = from_region(library, model)
        with pytest.raises(InferenceServerException, match="restricted"):
            client.register_system_shared_memory("boundary", f"/{region.name}", region.size)
        client.register_system_shared_memory("boundary", f"/{region.name}", region.size, headers={header: key})
        try:
            with pytest.raises(InferenceServerException) as refused:
                client.infer(model, given)
        finally:
            client.unregister_system_shared_memory("boundary", headers={header: key})
    assert str(refused.value.message()).startswith(REFUSAL.format(model))


@pytest.mark.parametrize("model", INTERNAL_MODELS)
@pytest.mark.parametrize("change", ["", "x", "token's end", "another", "number", "flag"])
def test_a_token_that_is_nearly_right_is_refused(server: Server, model: str, change: str) -> None:
    token = server.token
    false: Any = {"x": "x", "token's end": token[:-1], "another": new_token(), "number": 1, "flag": True}.get(
        change, ""
    )
    _, values = next(request for request in REQUESTS.values() if request[0] == model)
    with (
        tritonclient.http.InferenceServerClient(server.http_url) as client,
        pytest.raises(InferenceServerException) as refused,
    ):
        client.infer(model, http_inputs(values), parameters={PARAMETER: false})
    assert str(refused.value.message()).startswith(REFUSAL.format(model))


@pytest.mark.parametrize("model", INTERNAL_MODELS)
def test_a_probe_is_answered_and_reads_nothing(server: Server, model: str) -> None:
    """Not even a note that comes with it."""
    values = next(request[1] for request in REQUESTS.values() if request[0] == model)
    if model == "dit_denoiser":
        values = REQUESTS["note"][1]
    before = pace(server)["rates"]
    with tritonclient.http.InferenceServerClient(server.http_url) as client:
        result = client.infer(model, http_inputs(values), parameters={"probe": True}).get_response()
    assert [output["name"] for output in result.get("outputs", [])] == (["REPORT"] if model == "dit_denoiser" else [])
    assert pace(server)["rates"] == before


def test_the_token_is_in_the_environment_and_nowhere_else(triton: TritonServer, server: Server) -> None:
    token = server.token
    tree = [psutil.Process(triton.pid), *psutil.Process(triton.pid).children(recursive=True)]
    assert len(tree) > 2
    for process in tree:
        assert token not in " ".join(process.cmdline())
    assert triton.options.log is not None
    assert token not in triton.options.log.read_text(encoding="utf-8", errors="replace")
    assert VARIABLE not in os.environ


def test_what_the_server_writes_is_its_users_alone(triton: TritonServer) -> None:
    """Prompts, pictures and videos pass through these files."""
    regions = list(SHARED_MEMORY.glob(f"{triton.shm_prefix}*"))
    assert triton.options.log is not None
    assert regions
    for path in (triton.options.log, *regions):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_every_start_has_another_token() -> None:
    first, second = (server_environment(None)[VARIABLE] for _ in range(2))
    assert len(first) >= 43
    assert first != second


def test_a_token_of_the_launchers_own_environment_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "known to whoever set it, and long enough")
    assert server_environment(None)[VARIABLE] != os.environ[VARIABLE]


@pytest.mark.parametrize("token", [None, "", "short"])
def test_models_do_not_start_without_a_token(token: str | None) -> None:
    with pytest.raises(SetupError, match=rf"^{VARIABLE} must hold the token .*python -m stepvideo_serve serve"):
        Boundary.from_environment({} if token is None else {VARIABLE: token})


@pytest.mark.parametrize("given", [None, "", "é" * 43, "\udc80", 7, {"a": 1}])
def test_whatever_is_not_the_token_is_refused(given: object) -> None:
    token = new_token()
    boundary = Boundary(token)
    boundary.check("vae_decoder", {PARAMETER: token})
    with pytest.raises(InvalidRequest, match="The caller of vae_decoder must be a model of this server"):
        boundary.check("vae_decoder", {} if given is None else {PARAMETER: given})
    assert token not in repr(boundary)
