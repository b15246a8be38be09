"""What the public models tell of their requests: metrics, log events and spans."""

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.serving.observe.logs import configure_logging, log_event
from stepvideo_serve.serving.observe.metric_families import OK, STAGES, codes
from stepvideo_serve.serving.observe.metrics import Heartbeats, Metrics
from stepvideo_serve.serving.observe.traces import Origin, Tracer, origin_of

MEASURED_BY_DENOISER = frozenset({"queue", "denoise"})  # which knows how long a run waited and computed

_logger = logging.getLogger(__name__)


class RequestWatches:
    """Makes the watches of one public model, and sets its log up."""

    def __init__(self, config: ServeConfig, model: str) -> None:
        configure_logging(config.logging, model, in_stub=True)
        self.model, self.tracer, self.metrics = model, Tracer(config.telemetry, model), Metrics()
        self._beats = Heartbeats(self.metrics, model)
        for code in codes():
            self.metrics.add("stepvideo_requests_total", 0, model=model, code=code)
        self.metrics.show("stepvideo_request_seconds", model=model)
        for stage in set(STAGES) - MEASURED_BY_DENOISER:
            self.metrics.show("stepvideo_stage_seconds", stage=stage)

    def begin(self, request: Any) -> "RequestWatch":
        """The watch of a request that has just come in."""
        return RequestWatch(self, origin_of(request))

    def close(self) -> None:
        """Sends the spans that are left; no other method may be called afterwards."""
        self._beats.close()
        self.tracer.close()


class RequestWatch:
    """One public request, from its arrival to its answer. Its id is Triton's request id, or what `identify` said, or
    one made up here."""

    def __init__(self, watches: RequestWatches, origin: Origin) -> None:
        self._watches, self._named = watches, bool(origin.request_id)
        self._request_id = origin.request_id or uuid.uuid4().hex
        self._began_s = time.monotonic()
        self._span = self._stage_span = watches.tracer.span("request", origin.traceparent, model=watches.model)
        self._seconds: dict[str, float] = {}
        self._ended = False

    @property
    def origin(self) -> Origin:
        """The origin of calls that the stage under way makes to other models."""
        return Origin(self._request_id, self._stage_span.traceparent)

    def identify(self, request_id: str | None) -> None:
        """The request's inputs are valid; `request_id` is REQUEST_ID, None without one."""
        if request_id is not None and not self._named:
            self._request_id = request_id
        self._log("request_accepted", logging.INFO)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the block as a stage of the request; blocks of the same stage add up."""
        began_s = time.monotonic()
        self._stage_span = span = self._watches.tracer.span(name, self._span.traceparent)
        try:
            yield
        except BaseException as error:
            span.end(str(error) or type(error).__name__)
            raise
        else:
            span.end()
        finally:
            self._stage_span = self._span
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began_s

    def end(self, error: BaseException | None = None) -> None:
        """The request is answered, with an error or with its result (None); more calls do nothing."""
        if self._ended:
            return
        self._ended = True
        metrics, model, seconds = self._watches.metrics, self._watches.model, time.monotonic() - self._began_s
        code = OK if error is None else error.code if isinstance(error, StepVideoError) else StepVideoError.code
        metrics.add("stepvideo_requests_total", model=model, code=code)
        if error is None:
            metrics.observe("stepvideo_request_seconds", seconds, model=model)
            for stage in self._seconds.keys() - MEASURED_BY_DENOISER:
                metrics.observe("stepvideo_stage_seconds", self._seconds[stage], stage=stage)
        sentence = None if error is None else f"{code}: {error}"
        self._span.end(sentence, request_id=self._request_id, code=code)
        failed = code == StepVideoError.code
        self._log(
            "request_ended", logging.ERROR if failed else logging.INFO, code=code, seconds=seconds, error=sentence
        )

    def _log(self, event: str, level: int, **fields: object) -> None:
        log_event(_logger, event, level, request_id=self._request_id, trace_id=self._span.trace_id, **fields)
