"""perf.soak on the real server, with few requests; and callers who are slow, silent, gone, or at the limits."""

import argparse
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2_grpc

from perf.soak import honest
from perf.soak.__main__ import metric, soak_server
from perf.soak.attacks import REFUSED, SERVED, Attack, blank_png, refused, scanned_jpeg, served
from perf.soak.growth import Sample, slope
from perf.soak.plan import ACTIONS, good_requests, plan
from perf.soak.report import Books, Ended, Soak, flat_below_mib, growing, violations
from perf.soak.wire import CANCELLED, OK, OWN_CONNECTION, Outcome, exchange, message
from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.launch.boundary import INTERNAL_MODELS
from stepvideo_serve.launch.server import TritonServer
from stepvideo_serve.video.image import fit_image_file
from tests.server_deaths import WatchServer
from tests.serving.calls import PATIENCE_S, Refused, Server, Values
from tests.serving.launch import serving

IDLE_STREAMS = 200
MAX_IMAGE_BYTES = 2_000_000  # of the server of these tests
MAX_PROMPT_BYTES = 16 * 2**10


def test_the_same_seed_plans_the_same_requests() -> None:
    first, again, other = (plan(200, seed, good_requests()) for seed in (1, 1, 2))
    assert [(p.action, p.kind, p.leave_after_s) for p in first] == [(p.action, p.kind, p.leave_after_s) for p in again]
    assert [p.action for p in first] != [p.action for p in other]
    assert {p.action for p in first} == set(ACTIONS)


def test_slope_is_of_the_second_half() -> None:
    requests = list(range(0, 101, 10))
    values = [2**20 * min(n, 50) * 7 + 2**20 * 3 * max(0, n - 50) for n in requests]
    assert slope(requests, values) == pytest.approx(300)
    assert np.isnan(slope([0, 0, 0], [1, 2, 3]))
    assert np.isnan(slope([], []))


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (Outcome("INTERNAL", "INTERNAL: it failed", 1), "ended with INTERNAL"),
        (Outcome(OK, "", 2, b"right"), "ended 2 times"),
        (Outcome(OK, "", 1, b"wrong"), "other bits"),
        (Outcome(CANCELLED, "", 0), "ended with CANCELLED"),
        (Outcome(OK, "", 1, b"right"), None),
    ],
)
def test_what_is_a_violation(outcome: Outcome, says: str | None) -> None:
    [stream] = [p for p in plan(50, 0, good_requests()) if p.action == "stream"][:1]
    found = list(violations(Soak([Ended(stream, outcome, 0, 0)]), [b"right"] * 6))
    assert len(found) == (says is not None)
    assert all(says is not None and says in sentence for sentence in found)


def test_the_books_of_the_server_must_agree() -> None:
    [stream] = [p for p in plan(50, 0, good_requests()) if p.action == "stream"][:1]
    ended = [Ended(stream, Outcome(OK, "", 1, b"right"), refusals=3, kills=0)]
    for books, count in (
        (Books(4, 0, 0, 0, 0, 0, 0), 0),
        (Books(5, 0, 0, 0, 0, 0, 0), 1),
        (Books(4, 1, 2, 0, 0, 0, 0), 2),
    ):
        assert len(list(violations(Soak(ended, books=books), [b"right"] * 6))) == count


def test_what_an_attack_gets_that_it_must_not_is_a_violation() -> None:
    good = good_requests()
    [direct] = [p for p in plan(200, 0, good) if p.attack is not None and not p.attack.public][:1]
    assert direct.attack is not None
    answered = Soak([Ended(direct, Outcome(OK, "", 1), 0, 0)], books=Books(0, 0, 0, 0, 0, 0, 0))
    [sentence] = violations(answered, [b""] * 6)
    assert f"(attack: {direct.attack.name}, 0 kills) ended with OK" in sentence
    refusal = Soak([Ended(direct, Outcome("INVALID_ARGUMENT", "", 1), 0, 0)], books=Books(0, 0, 0, 0, 0, 0, 0))
    assert not list(violations(refusal, [b""] * 6)), "calls of internal models are not among the server's requests"


def test_the_ratio_of_honest_throughput() -> None:
    attacks = {"note": Counter(INVALID_ARGUMENT=10)}
    found = {
        honest.QUIET: [honest.Round(10, wall_s=10.0, step_s=8.0, ranks_s=8.0, server_cpu_s=10.0)] * 2,
        REFUSED: [
            honest.Round(10, 0, 12.5, step_s=8.0, ranks_s=10.0, server_cpu_s=25.0, attacks=attacks, wrong=["one"]),
            honest.Round(10, wall_s=12.5),
        ],
        SERVED: [honest.Round(5, wall_s=10.0)] * 2,
    }
    told = honest.figures(found)
    assert (told[REFUSED]["ratio"], told[SERVED]["ratio"]) == (0.8, 0.5)
    assert told[REFUSED]["share_of_steps"] == 0.8
    assert told[REFUSED]["server_cpu_ms_per_attack"] == 500.0, (
        "25 s beside the 20 s of twenty requests, for ten attacks"
    )
    one, throughput, steps = honest.starved(told, found)
    assert one == "one"
    assert throughput == "honest callers had 0.80 of their throughput under attack, the least is 0.9"
    assert steps == "honest requests had 0.80 of the steps under attacks that are refused"
    well = {group: [honest.Round(10, wall_s=10.0)] * 2 for group in found}
    assert not list(honest.starved(honest.figures(well), well))


def test_the_pictures_of_attackers_are_what_they_are_called() -> None:
    assert fit_image_file(scanned_jpeg(64, 100), 32, 32).pixels.shape == (3, 32, 32)
    with pytest.raises(InvalidRequest, match="at most 100 JPEG scans at 64x64, got 101"):
        fit_image_file(scanned_jpeg(64, 101), 32, 32)
    assert fit_image_file(blank_png(640, 480), 32, 32).pixels.min() > 0.999, "transparency is flattened onto white"
    with pytest.raises(InvalidRequest, match="at most 64000000 pixels, got 8001x8000"):
        fit_image_file(blank_png(8001, 8000, rows=1), 32, 32)


def test_memory_that_grows_is_told() -> None:
    def figures(rate: float) -> dict[str, object]:
        return {"mib_per_100_requests": {"server": rate, "shm": 0.0}, "flat_below": flat_below_mib()}

    image = good_requests()[0]["IMAGE"]
    samples = [Sample(n, n * len(image), 0, 0) for n in range(100)]  # every request leaves its picture behind
    leaked = slope([s.requests for s in samples], [s.server for s in samples])
    assert len(list(growing(figures(leaked)))) == 1
    assert not list(growing(figures(0.0)))


ATTACKS = refused(good_requests()[0])


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.name}{' with a token' * bool(attack.token)}")
def test_an_attack_is_refused_before_any_step(triton: TritonServer, server: Server, attack: Attack) -> None:
    steps = metric(triton.metrics_url, "stepvideo_steps_total")
    with grpc.insecure_channel(server.grpc_url, options=OWN_CONNECTION) as channel:
        outcome = attack.send(channel, PATIENCE_S)
    assert outcome.code in attack.ends, outcome.text
    assert metric(triton.metrics_url, "stepvideo_steps_total") == steps
    assert server.waiting() == 0


def test_every_internal_model_is_attacked_and_the_costliest_is_served() -> None:
    assert {attack.model for attack in ATTACKS if not attack.public} == set(INTERNAL_MODELS)
    assert all(OK in attack.ends and attack.public for attack in served(good_requests()[0]))


def test_honest_requests_end_right_beside_strangers(server: Server) -> None:
    """How it is measured; how much it is, `make soak` says."""
    found = honest.compare(server.grpc_url, 3, 1, seed=0, meters=None, order=(honest.QUIET, REFUSED), nice=0)
    assert not [sentence for rounds in found.values() for each in rounds for sentence in each.wrong]
    assert [each.requests for rounds in found.values() for each in rounds] == [3, 3]
    assert found[REFUSED][0].attacks


@pytest.fixture(scope="module")
def soaked(
    root: Path, config_text: str, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer
) -> Iterator[TritonServer]:
    """A server of its own, whose queue is short: requests find it full."""
    config = config_text.replace("max_queued = 36", "max_queued = 8").replace("[denoiser]", "[denoiser]\nthreads = 1")
    assert "max_queued = 8" in config
    with serving(root, tmp_path_factory.mktemp("soak"), config, watch) as running:
        yield running


@pytest.mark.slow
def test_soak(soaked: TritonServer) -> None:
    options = argparse.Namespace(requests=120, concurrency=16, seed=3, kill_every=40, honest=6, rounds=1)
    figures = soak_server(soaked.grpc_url, soaked, options)
    # Memory is judged by `make soak`: caches and allocators still fill while so few requests pass.
    # So is throughput, which a busy machine decides as well.
    unjudged = ("memory ", "honest callers had ")
    assert not [sentence for sentence in figures["violations"] if not sentence.startswith(unjudged)]
    assert figures["requests"] == 120
    assert figures["kills"] >= 2
    assert figures["queue_full"] > 0
    assert figures["preemptions"] > 0
    assert figures["honest"][REFUSED]["share_of_steps"] > 0.99, "strangers had steps"
    assert all(figures["ends"].values()), "every action was planned"


def test_a_caller_that_reads_slowly_has_everything(server: Server, small: Values) -> None:
    expected = server.stream_result(small)["LATENTS"]
    with server.open({**small, "STEPS": np.array([20], np.int32)}) as slow, server.open(small) as other:
        time.sleep(1.0)
        np.testing.assert_array_equal(other.collect().result["LATENTS"], expected)
        answer = slow.collect()
    steps = [int(step["STEP"][0]) for step in answer.progress]
    assert list(dict.fromkeys(steps)) == list(range(min(steps), 21))
    assert answer.result


def test_callers_that_do_not_read_at_all_stop_nobody(server: Server, small: Values) -> None:
    """Raw frames of megabytes to connections whose receive window stays shut; and then they are gone."""
    expected = server.stream_result(small)["LATENTS"]
    large: Values = {
        **small,
        "OUTPUT": b"frames",
        "NUM_FRAMES": np.array([102], np.int32),
        "STEPS": np.array([1], np.int32),
    }
    with ExitStack() as stack:
        for _ in range(4):
            channel = stack.enter_context(grpc.insecure_channel(server.grpc_url))
            release = threading.Event()
            stack.callback(release.set)

            def outgoing(wait: threading.Event = release) -> Iterator[object]:
                yield message("ti2v", large)
                wait.wait()

            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(outgoing())  # never read
        np.testing.assert_array_equal(server.stream_result(small)["LATENTS"], expected)
    np.testing.assert_array_equal(server.stream_result(small)["LATENTS"], expected)


@pytest.mark.parametrize("leave", ["cancel", "close"])
def test_callers_that_vanish_leave_nothing(server: Server, small: Values, long: Values, leave: str) -> None:
    expected = server.stream_result(small)["LATENTS"]
    threads = [
        threading.Thread(target=exchange, args=(server.grpc_url, long, PATIENCE_S, 0.5 + 0.1 * n, leave))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    began_s = time.monotonic()
    np.testing.assert_array_equal(server.stream_result(small)["LATENTS"], expected)
    assert time.monotonic() - began_s < PATIENCE_S / 2, "a run of hours was not ended"


def test_idle_streams_and_silent_connections_cost_nobody_anything(server: Server, small: Values) -> None:
    expected = server.stream_result(small)["LATENTS"]
    host = server.grpc_url.rsplit(":", 1)[0]
    with ExitStack() as stack:
        for url in (server.grpc_url, server.http_url):
            for _ in range(10):
                stack.enter_context(socket.create_connection((host, int(url.rsplit(":", 1)[1])), timeout=10))
        half = stack.enter_context(socket.create_connection((host, int(server.http_url.rsplit(":", 1)[1])), timeout=10))
        half.sendall(b"POST /v2/models/ti2v_unary/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{")
        release = threading.Event()
        for _ in range(IDLE_STREAMS // 50):
            channel = stack.enter_context(grpc.insecure_channel(server.grpc_url))
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for _ in range(50):
                stub.ModelStreamInfer(_silence(release))
        stack.callback(release.set)
        np.testing.assert_array_equal(server.stream_result(small)["LATENTS"], expected)
        np.testing.assert_array_equal(server.grpc(small)["LATENTS"], expected)
        np.testing.assert_array_equal(server.http(small)["LATENTS"], expected)
    np.testing.assert_array_equal(server.stream_result(small)["LATENTS"], expected)


def _silence(release: threading.Event) -> Iterator[object]:
    """The requests of a caller that never sends one."""
    release.wait()
    yield from ()


def test_payloads_at_the_limit_and_one_byte_above(server: Server, small: Values, picture: bytes) -> None:
    expected = server.stream_result(small)["LATENTS"]
    # What follows the end of a PNG is not looked at.
    at_limit = {**small, "IMAGE": picture + bytes(MAX_IMAGE_BYTES - len(picture))}
    np.testing.assert_array_equal(server.stream_result(at_limit)["LATENTS"], expected)
    above = {**small, "IMAGE": picture + bytes(MAX_IMAGE_BYTES + 1 - len(picture))}
    with pytest.raises(Refused, match=f"IMAGE must be at most {MAX_IMAGE_BYTES} bytes, got {MAX_IMAGE_BYTES + 1}"):
        server.grpc(above)
    for size, says in (
        (MAX_PROMPT_BYTES, "at most 320 tokens"),
        (MAX_PROMPT_BYTES + 1, f"at most {MAX_PROMPT_BYTES} bytes"),
    ):
        with pytest.raises(Refused, match=says):
            server.grpc({**small, "PROMPT": b"a b " * (size // 4) + b"a" * (size % 4)})
    np.testing.assert_array_equal(server.stream_result(small)["LATENTS"], expected)
