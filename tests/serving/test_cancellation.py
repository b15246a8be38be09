"""Whoever cancels, or goes away, frees the ranks within a step: shown by the CPU time of the processes that compute."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import numpy as np
import pytest

from tests.serving.calls import Server, Values, cpu_s, grpc_request, until

TIMEOUT_S = 3.0

# Sends the request that it reads, and says how many responses have come.
CLIENT = """
import sys, threading, grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

def outgoing():
    yield service_pb2.ModelInferRequest.FromString(sys.stdin.buffer.read())
    threading.Event().wait()

stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
for _ in stub.ModelStreamInfer(outgoing()):
    print("step", flush=True)
"""


@dataclass(frozen=True)
class Cost:
    """CPU seconds of the rank: one step of the long run, and all of a small request."""

    step_s: float
    small_s: float


@pytest.fixture(scope="module")
def cost(server: Server, long: Values, small: Values) -> Cost:
    rank = server.rank()
    server.stream(small)
    began_s = cpu_s(rank)
    server.stream(small)
    small_s = cpu_s(rank) - began_s
    with server.open(long) as stream:
        stream.wait_for_step(2)
        began_s = cpu_s(rank)
        stream.wait_for_step(6)
        return Cost((cpu_s(rank) - began_s) / 4, small_s)


def cancel_stream(server: Server, long: Values) -> None:
    with server.open(long) as stream:
        stream.wait_for_step(2)
        stream.cancel()


def cancel_unary(server: Server, long: Values) -> None:
    running = cpu_s(server.rank()) + 0.5
    with server.grpc_call(long) as call:
        until(lambda: cpu_s(server.rank()) > running, "the run to begin")
        call.cancel()


def let_unary_time_out(server: Server, long: Values) -> None:
    with server.grpc_call(long, timeout_s=TIMEOUT_S) as call:
        assert call.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED


def kill_client(server: Server, long: Values) -> None:
    command = [sys.executable, "-c", CLIENT, server.grpc_url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(grpc_request("ti2v", long).SerializeToString())
        client.stdin.close()
        assert client.stdout.readline() == b"step\n"
        client.kill()


@pytest.mark.parametrize("leave", [cancel_stream, cancel_unary, let_unary_time_out, kill_client])
def test_a_cancelled_run_stops_within_a_step(
    server: Server, long: Values, small: Values, cost: Cost, leave: Callable[[Server, Values], None]
) -> None:
    rank = server.rank()
    leave(server, long)
    left_s = cpu_s(rank)
    assert server.grpc(small)["SEED"] == [7]  # waits until the rank is free
    # The step under way, and the one that may begin before the cancel has arrived.
    assert cpu_s(rank) - left_s < 2.5 * cost.step_s + 2 * cost.small_s
    assert server.rank().pid == rank.pid  # it stopped by itself


def test_a_request_cancelled_before_its_first_step_leaves_nothing_behind(
    server: Server, long: Values, small: Values, cost: Cost
) -> None:
    rank = server.rank()
    began_s = cpu_s(rank)
    for _ in range(5):
        with server.open(long) as stream:
            stream.cancel()
    server.grpc(small)
    assert cpu_s(rank) - began_s < 5 * 1.5 * cost.step_s + 2 * cost.small_s


def test_decoding_stops_within_a_chunk(server: Server, small: Values) -> None:
    decoder = server.process("/vae_decoder/")
    size: Values = {"HEIGHT": np.array([32], np.int32), "WIDTH": np.array([48], np.int32), "OUTPUT": b"frames"}
    one_chunk: Values = {**small, **size}
    began_s = cpu_s(decoder)
    server.stream(one_chunk)
    chunk_s = cpu_s(decoder) - began_s

    with server.open({**one_chunk, "NUM_FRAMES": np.array([102], np.int32)}) as stream:
        began_s = cpu_s(decoder)
        until(lambda: cpu_s(decoder) > began_s + chunk_s / 4, "the decoder to begin")
        stream.cancel()
        cancelled_s = cpu_s(decoder)
    server.stream(one_chunk)  # waits until the decoder is free
    # Of 7 chunks: the one under way, one that may begin before the cancel has arrived, and its own. CPU seconds of
    # equal work differ on a shared machine, so two more are allowed.
    assert cpu_s(decoder) - cancelled_s < 5 * chunk_s
