"""OpenTelemetry spans of requests, sent as OTLP over HTTP; without a collector in the configuration, nothing.

A context travels as a W3C traceparent (https://www.w3.org/TR/trace-context), "00-<trace>-<span>-<flags>": from the
caller, and between the models of this server, as the parameter `traceparent` of a Triton request.
"""

import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepvideo_serve.config import TelemetryConfig
from stepvideo_serve.errors import ConfigError

TRACEPARENT = "traceparent"
TRACEPARENT_FORM = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.{0,100})?")
MAX_ID = 128  # characters of a request's id
TRACES_PATH = "/v1/traces"
SERVICE = "stepvideo-serve"
EXPORT_EVERY_MS = 1000
EXPORT_TIMEOUT_S = 5.0
CLOSE_S = 1.0  # a stopping server does not wait longer for its collector

Attribute = str | int | float | bool


@dataclass(frozen=True)
class Origin:
    """Whom a request comes from: its id, "" where the caller gave none, and its traceparent, "" without one."""

    request_id: str = ""
    traceparent: str = ""

    @property
    def parameters(self) -> dict[str, str]:
        """What a request to another model carries."""
        return {TRACEPARENT: self.traceparent} if self.traceparent else {}


UNKNOWN = Origin()


def origin_of(request: Any) -> Origin:
    """Of an InferenceRequest of the Python backend, whose parameters are a JSON object. Header names may come in any
    case. What a caller gives need not make sense: an id is cut, a traceparent of another form is none."""
    try:
        request_id = request.request_id()[:MAX_ID]
        parameters = json.loads(request.parameters() or "{}")
    except ValueError:  # no UTF-8, or numbers that JSON does not have
        return UNKNOWN
    values = [str(value) for name, value in parameters.items() if name.lower() == TRACEPARENT]
    return Origin(request_id, next(filter(TRACEPARENT_FORM.fullmatch, values), ""))


class Span:
    """A span that may record nothing. `traceparent` is for its children."""

    def __init__(self, traceparent: str, recorded: Any = None) -> None:
        self.traceparent = traceparent
        self._recorded = recorded

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, "" without a trace."""
        return self.traceparent.split("-")[1] if self.traceparent.count("-") >= 3 else ""

    def end(self, error: str | None = None, **attributes: Attribute) -> None:
        """With what was learned since the beginning; `error`: the sentence that it failed with."""
        if self._recorded is None:
            return
        from opentelemetry.trace import StatusCode

        self._recorded.set_attributes(named(attributes))
        if error is not None:
            self._recorded.set_status(StatusCode.ERROR, error)
        self._recorded.end()


class Tracer:
    """Makes the spans of one process. Any thread may call.

    Raises ConfigError where an endpoint is configured and the packages are not installed.
    """

    def __init__(self, config: TelemetryConfig, model: str) -> None:
        self._provider = _provider(config, model) if config.otlp_endpoint else None
        self._tracer = None if self._provider is None else self._provider.get_tracer(__name__)

    def span(self, name: str, parent: str, began_s: float | None = None, **attributes: Attribute) -> Span:
        """A span that begins now, or began at `began_s` (time.monotonic()). `parent` is a traceparent; without a valid
        one the span is the first of its trace. Attributes get the prefix "stepvideo."."""
        if self._tracer is None:
            return Span(parent)
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        ago_s = 0.0 if began_s is None else time.monotonic() - began_s
        recorded = self._tracer.start_span(
            name,
            propagator.extract({TRACEPARENT: parent} if parent else {}),
            start_time=time.time_ns() - round(ago_s * 1e9),
            attributes=named(attributes),
        )
        carrier: dict[str, str] = {}
        propagator.inject(carrier, trace.set_span_in_context(recorded))
        return Span(carrier[TRACEPARENT], recorded)

    def close(self) -> None:
        """Sends what is left, for a second at most."""
        if self._provider is not None:
            last = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
            last.start()
            last.join(CLOSE_S)


def named(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    """The attributes under the names that they are sent with."""
    return {f"stepvideo.{name}": value for name, value in attributes.items()}


def _provider(config: TelemetryConfig, model: str) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError as error:
        raise ConfigError(
            f"[telemetry] otlp_endpoint needs the OpenTelemetry packages, {error.name} is missing: "
            "pip install 'stepvideo-serve[telemetry]', or leave the endpoint empty."
        ) from None
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(config.sample_ratio),
        resource=Resource.create({"service.name": SERVICE, "stepvideo.model": model}),
        shutdown_on_exit=False,
    )
    url = config.otlp_endpoint.rstrip("/") + TRACES_PATH
    exporter = OTLPSpanExporter(endpoint=url, timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS))
    return provider
