"""Spans of real requests, as a collector receives them over OTLP/HTTP."""

import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from stepvideo_serve.config import TelemetryConfig
from stepvideo_serve.errors import ConfigError
from stepvideo_serve.launch.server import TritonServer
from stepvideo_serve.serving.observe.traces import Origin, Tracer, origin_of
from tests.server_deaths import WatchServer
from tests.serving.calls import Refused, Stream, Values, grpc_request, unary, until
from tests.serving.launch import CONFIG, Engines, serving

CALLER = "b7ad6b7169203331"
VALID = f"00-{'1' * 32}-{CALLER}-01"
STAGES = {"image", "text", "vae_encode", "denoise", "check"}
ERROR = 2  # Status.StatusCode.STATUS_CODE_ERROR


@dataclass
class Collector:
    """Takes OTLP at /v1/traces on a free port, and keeps the spans with the model that sent them."""

    spans: list[tuple[str, Any]] = field(default_factory=list)
    url: str = ""

    def trace(self, trace_id: str) -> list[Any]:
        return [span for _, span in list(self.spans) if span.trace_id.hex() == trace_id]

    def senders(self, trace_id: str) -> set[str]:
        return {model for model, span in list(self.spans) if span.trace_id.hex() == trace_id}

    def wait(self, trace_id: str, name: str, count: int = 1) -> list[Any]:
        """The trace, once it has that many spans of the name."""
        until(lambda: len(named(self.trace(trace_id), name)) >= count, f"{count} spans {name}")
        return self.trace(trace_id)


def named(spans: list[Any], name: str) -> list[Any]:
    return sorted((span for span in spans if span.name == name), key=lambda span: span.start_time_unix_nano)


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


def handler(collector: Collector) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    said = {item.key: item.value.string_value for item in resource.resource.attributes}
                    assert said["service.name"] == "stepvideo-serve"
                    spans = [span for scope in resource.scope_spans for span in scope.spans]
                    collector.spans += [(said["stepvideo.model"], span) for span in spans]
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    return Handler


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    kept = Collector()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(kept)) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        kept.url = f"http://127.0.0.1:{http.server_port}"
        yield kept
        http.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def traced(
    root: Path, engines: Engines, collector: Collector, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer
) -> Iterator[TritonServer]:
    config = CONFIG.format(model=engines.model_dir, engines=engines.graphs_dir, max_queued=2)
    config += f'[telemetry]\notlp_endpoint = "{collector.url}"\nsteps_per_span = 2\n'
    with serving(root, tmp_path_factory.mktemp("traced"), config, watch) as running:
        yield running


def traceparent(trace_id: str, flags: str = "01") -> str:
    return f"00-{trace_id}-{CALLER}-{flags}"


def ask(
    triton: TritonServer, model: str, values: Values, *, header: str = "", parameter: str = "", request_id: str = ""
) -> None:
    """A request with a traceparent, to its result. Raises Refused."""
    request = grpc_request(model, values)
    request.id = request_id
    if parameter:
        request.parameters["traceparent"].string_param = parameter
    metadata = [("traceparent", header)] if header else []
    if model == "ti2v_unary":
        unary(triton.grpc_url, request, metadata)
        return
    with Stream(triton.grpc_url, request, metadata) as stream:
        assert "SEED" in stream.collect().result, "the stream ended without a result"


@pytest.mark.parametrize("model", ["ti2v", "ti2v_unary"])
@pytest.mark.parametrize("way", ["header", "parameter"])
def test_a_request_becomes_a_trace_of_its_caller(
    traced: TritonServer, collector: Collector, small: Values, model: str, way: str
) -> None:
    trace_id = uuid.uuid4().hex
    five_steps = {**small, "STEPS": np.array([5], np.int32)}
    if way == "header":
        ask(traced, model, five_steps, header=traceparent(trace_id), request_id="mine-1")
    else:
        ask(traced, model, five_steps, parameter=traceparent(trace_id), request_id="mine-1")
    collector.wait(trace_id, "steps", 3)
    spans = collector.wait(trace_id, "request")

    [request] = named(spans, "request")
    assert request.parent_span_id.hex() == CALLER
    assert attributes(request) == {"stepvideo.model": model, "stepvideo.request_id": "mine-1", "stepvideo.code": "OK"}
    stages = [span for span in spans if span.parent_span_id == request.span_id]
    assert {span.name for span in stages} == STAGES
    [denoise] = named(spans, "denoise")
    [queue] = named(spans, "queue")
    steps = named(spans, "steps")
    assert {span.parent_span_id for span in [queue, *steps]} == {denoise.span_id}
    ranges = [[attributes(span)[f"stepvideo.{end}_step"] for end in ("first", "last")] for span in steps]
    assert ranges == [[1, 2], [3, 4], [5, 5]]
    for inner, outer in [(denoise, request), (queue, denoise), *((span, denoise) for span in steps)]:
        assert outer.start_time_unix_nano <= inner.start_time_unix_nano + CLOCK_NS
        assert inner.end_time_unix_nano <= outer.end_time_unix_nano + CLOCK_NS
    assert collector.senders(trace_id) == {model, "dit_denoiser"}


CLOCK_NS = 50_000_000  # wall clocks of two processes, and a thread that was not on its core when it read one


def test_an_error_is_in_its_span(traced: TritonServer, collector: Collector, small: Values) -> None:
    trace_id = "e" * 32
    with pytest.raises(Refused, match=r"INVALID_ARGUMENT: ") as refusal:
        ask(traced, "ti2v", {**small, "STEPS": np.array([0], np.int32)}, header=traceparent(trace_id))
    [request] = collector.wait(trace_id, "request")
    assert (request.status.code, request.status.message) == (ERROR, refusal.value.text)
    assert attributes(request)["stepvideo.code"] == "INVALID_ARGUMENT"


def test_a_caller_who_does_not_sample_is_obeyed_and_others_begin_a_trace(
    traced: TritonServer, collector: Collector, small: Values
) -> None:
    silent = "5" * 32
    ask(traced, "ti2v_unary", small, header=traceparent(silent, "00"))
    ask(traced, "ti2v_unary", small, header="nonsense", request_id="alone")

    def own() -> list[Any]:
        return [span for _, span in list(collector.spans) if attributes(span).get("stepvideo.request_id") == "alone"]

    until(lambda: bool(own()), "the trace of the other one")
    [request] = own()
    assert request.parent_span_id == b""
    assert collector.trace(silent) == []


def test_the_log_names_request_and_trace(traced: TritonServer, collector: Collector, small: Values) -> None:
    trace_id = "a" * 32
    ask(traced, "ti2v", small, header=traceparent(trace_id), request_id="logged id")
    collector.wait(trace_id, "request")
    assert traced.options.log is not None
    lines = [line for line in traced.options.log.read_text(encoding="utf-8").splitlines() if trace_id in line]
    told = " ".join(lines)
    assert all('request_id=\\"logged id\\"' in line for line in lines), lines
    assert told.index("request_accepted") < told.index("turn_began") < told.index("turn_ended")
    assert "code=OK" in lines[-1]


def test_without_an_endpoint_nothing_is_recorded_and_the_context_goes_on() -> None:
    tracer = Tracer(TelemetryConfig(), "ti2v")
    span = tracer.span("request", traceparent("1" * 32))
    assert (span.traceparent, span.trace_id) == (traceparent("1" * 32), "1" * 32)
    span.end("failed", code="INTERNAL")
    assert tracer.span("request", "").trace_id == ""
    tracer.close()


def test_a_collector_that_is_not_there_does_not_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer(TelemetryConfig(otlp_endpoint="http://127.0.0.1:9"), "ti2v")
    tracer.span("request", "").end()
    closing = threading.Thread(target=tracer.close)
    closing.start()
    closing.join(10.0)
    assert not closing.is_alive()
    until(lambda: "Failed to establish a new connection" in caplog.text, "the log to say so")


@pytest.mark.parametrize("endpoint", ["collector:4318", "grpc://collector:4317"])
def test_an_endpoint_must_be_a_url(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint must be an http or https URL, got "):
        TelemetryConfig(otlp_endpoint=endpoint)


@dataclass(frozen=True)
class Request:
    """As much of an InferenceRequest as is asked for its origin."""

    text: str

    def parameters(self) -> str:
        return self.text

    def request_id(self) -> str:
        return "7"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("", ""),
        ("{}", ""),
        (json.dumps({"Traceparent": VALID}), VALID),
        (json.dumps({"traceparent": "x", "TRACEPARENT": VALID}), VALID),
        ('{"traceparent": 3}', ""),
        (json.dumps({"traceparent": VALID.upper()}), ""),
        (json.dumps({"traceparent": f"{VALID}\n"}), ""),
        (json.dumps({"other": VALID}), ""),
    ],
)
def test_the_origin_of_a_request(parameters: str, expected: str) -> None:
    assert origin_of(Request(parameters)) == Origin("7", expected)


def test_parameters_that_cannot_be_read_are_no_reason_to_fail() -> None:
    assert origin_of(Request('{"x": nan')) == Origin()
