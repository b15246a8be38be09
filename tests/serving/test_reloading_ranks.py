"""text_encoder while the ranks that encode for it are started anew, which takes long: it answers probes and cancels."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from tritonclient.grpc import service_pb2_grpc

from stepvideo_serve.launch.health import State, ask
from stepvideo_serve.launch.server import TritonServer
from stepvideo_serve.launch.supervise import Rules, Supervisor
from stepvideo_serve.serving.stage_work import CALL_ID, CANCEL_CALL
from tests.server_deaths import WatchServer
from tests.serving.calls import Server, Values, command, grpc_request, until
from tests.serving.launch import EAGER, serving
from tests.serving.server_faults import SITE

SLOW_S = 30.0
RULES = Rules(check_s=0.2, answer_s=2.0)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slow_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranks that start while this file exists take so many seconds more."""
    return tmp_path_factory.mktemp("slow") / "seconds"


@pytest.fixture(scope="module")
def triton(
    root: Path, mini_checkpoint: Path, slow_start: Path, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer
) -> Iterator[TritonServer]:
    """Two ranks, which hold a half of Step-LLM each."""
    config = EAGER.format(model=mini_checkpoint, layout="tp2") + "[text]\non_ranks = true\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SITE), prepend=os.pathsep)
        patch.setenv("FAULT_SLOW_START", str(slow_start))
        with serving(root, tmp_path_factory.mktemp("reloading"), config, watch) as running:
            yield running


@pytest.fixture(scope="module")
def server(triton: TritonServer) -> Server:
    return Server(triton.grpc_url, triton.http_url, triton.pid)


def ranks(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.pid).children(recursive=True)
    return [child for child in children if "stepvideo_serve.parallel.rank_process" in command(child)]


def test_probes_and_cancels_are_answered_while_the_ranks_start(
    triton: TritonServer, server: Server, small: Values, slow_start: Path
) -> None:
    server.stream(small)
    slow_start.write_text(str(SLOW_S))
    began_s = time.monotonic()
    old = ranks(server)
    old[1].kill()
    until(lambda: not any(process.is_running() for process in old), "the ranks to end")

    said: list[str] = []
    supervisor = Supervisor(triton, RULES, said.append)
    with (
        grpc.insecure_channel(server.grpc_url) as channel,
        server.open({**small, "PROMPT": b"a dog"}) as left,
        server.open({**small, "PROMPT": b"a bird"}) as stays,
    ):
        until(lambda: ask(server.http_url, "ti2v", 10.0).report.get("unanswered") == 2, "both requests to be taken")
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        given_up = grpc_request("text_encoder", {"PROMPT": b"a cow"}, server.token)
        given_up.parameters[CALL_ID].string_param = "cow"
        call = stub.ModelInfer.future(given_up)
        for _ in range(40):
            supervisor.look()
            time.sleep(0.1)
        assert ask(server.http_url, "text_encoder", 2.0).state is State.WELL
        assert said == [], "nothing was wrong with any model"

        left.cancel()
        until(lambda: ask(server.http_url, "ti2v", 10.0).report["unanswered"] == 1, "the cancelled request to end")
        give_up = grpc_request("text_encoder", {"PROMPT": b""}, server.token)
        give_up.parameters[CANCEL_CALL].string_param = "cow"
        stub.ModelInfer(give_up)
        assert "CANCELLED: " in call.exception().details()
        assert not ask(server.http_url, "dit_denoiser", 10.0).report["ranks_ready"]
        assert time.monotonic() - began_s < SLOW_S, "the ranks must still be starting: the test says nothing"
        slow_start.unlink()

        answer = stays.collect()
    again = server.stream_result({**small, "PROMPT": b"a bird"})
    np.testing.assert_array_equal(answer.result["LATENTS"], again["LATENTS"])


def test_a_cancel_reaches_the_text_that_waits_for_the_ranks(server: Server, slow_start: Path) -> None:
    slow_start.write_text(str(SLOW_S))
    began_s = time.monotonic()
    old = ranks(server)
    old[0].kill()
    until(lambda: not any(process.is_running() for process in old), "the ranks to end")
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = grpc_request("text_encoder", {"PROMPT": b"a horse"}, server.token)
        request.parameters[CALL_ID].string_param = "horse"
        call = stub.ModelInfer.future(request)
        time.sleep(1.0)  # it is under way
        give_up = grpc_request("text_encoder", {"PROMPT": b""}, server.token)
        give_up.parameters[CANCEL_CALL].string_param = "horse"
        stub.ModelInfer(give_up)
        assert "CANCELLED: " in call.exception().details()
    assert time.monotonic() - began_s < SLOW_S, "the ranks must still be starting: the test says nothing"
    slow_start.unlink()
    until(lambda: len(ranks(server)) == 2, "the ranks to be started")
