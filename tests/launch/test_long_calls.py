"""The transport lets a call be silent for as long as a generation takes."""

import time
from pathlib import Path

import grpc
from tritonclient.grpc import InferResult, service_pb2_grpc

from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer
from tests.launch.test_server import MODEL, READY_S, model_repository
from tests.serving.calls import grpc_request

CALL_S = 32.0  # a server with Triton's defaults ends the connection at the third ping
PING_S = 6.0
SLOW = MODEL.replace("responses = []", f"import time\n        time.sleep({CALL_S})\n        responses = []")
PINGING = [
    ("grpc.keepalive_time_ms", int(PING_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


def test_a_silent_call_may_be_pinged_and_so_may_a_connection_without_a_call(tmp_path: Path) -> None:
    options = ServerOptions(model_repository(tmp_path, SLOW), log=tmp_path / "log", exit_timeout_s=2)
    with TritonServer(options) as server:
        server.wait_ready(READY_S)
        states: list[grpc.ChannelConnectivity] = []
        with (
            grpc.insecure_channel(server.grpc_url, options=PINGING) as busy,
            grpc.insecure_channel(server.grpc_url, options=[*PINGING, ("grpc.use_local_subchannel_pool", 1)]) as idle,
        ):
            grpc.channel_ready_future(idle).result(READY_S)
            idle.subscribe(states.append)
            stub = service_pb2_grpc.GRPCInferenceServiceStub(busy)
            began_s = time.monotonic()
            response = stub.ModelInfer(grpc_request("environment", {"NAME": b"pid"}), timeout=2 * CALL_S)
            assert time.monotonic() - began_s >= CALL_S
            assert InferResult(response).as_numpy("VALUE")[0].isdigit()
            assert set(states) == {grpc.ChannelConnectivity.READY}, "the idle connection was ended"
