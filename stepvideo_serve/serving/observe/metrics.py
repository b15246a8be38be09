"""Metrics through Triton's own endpoint. Loaded by Triton's stub processes only.

Triton keeps the samples in the server process: a sample of the same name and labels is one sample, whichever stubs add
to it, and it outlives a stub that is killed. So counters and histograms add up over the instances of a model; a gauge
must have one writer.
"""

import logging
import threading
import time
from typing import Any

import triton_python_backend_utils as pb_utils

from stepvideo_serve.serving.observe.metric_families import FAMILIES, Family

BEAT_S = 5.0

_logger = logging.getLogger(__name__)


class Metrics:
    """The samples that this process writes, each made when it is first used. Any thread may call; a call takes about
    20 us. A metric that Triton refuses is logged and lost: it never ends a request."""

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}
        self._samples: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._lock = threading.Lock()

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """To a counter; 0 makes the sample appear."""
        self._call(name, labels, "increment", value)

    def set(self, name: str, value: float, **labels: str) -> None:
        """A gauge."""
        self._call(name, labels, "set", value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """One value of a histogram."""
        self._call(name, labels, "observe", value)

    def show(self, name: str, **labels: str) -> None:
        """Makes a histogram appear before its first value."""
        with self._lock:
            self._sample(name, labels)

    def _call(self, name: str, labels: dict[str, str], method: str, value: float) -> None:
        try:
            with self._lock:
                getattr(self._sample(name, labels), method)(float(value))
        except pb_utils.TritonModelException as error:
            _logger.error("metric_refused", extra={"fields": {"metric": name, "error": str(error)}})

    def _sample(self, name: str, labels: dict[str, str]) -> Any:
        declared = FAMILIES[name]
        key = name, tuple(labels[label] for label in declared.labels)
        if key not in self._samples:
            if name not in self._families:
                self._families[name] = _family(name, declared)
            buckets = {"buckets": list(declared.buckets)} if declared.buckets else {}
            self._samples[key] = self._families[name].Metric(labels=labels, **buckets)
        return self._samples[key]


class Heartbeats:
    """Tells every few seconds that this process lives, on a thread of its own: the server keeps the samples of one that
    has died."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat-metric", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; before the process ends, which must not happen in the middle of a beat."""
        self._closing.set()
        self._thread.join()

    def _beat(self) -> None:
        while True:
            self._metrics.set("stepvideo_heartbeat_timestamp_seconds", time.time(), model=self._model)
            if self._closing.wait(BEAT_S):
                return


class CacheMetrics:
    """Hits and misses of one cache."""

    def __init__(self, metrics: Metrics, cache: str) -> None:
        self._metrics, self._cache = metrics, cache
        for outcome in ("hits", "misses"):
            self._metrics.add(f"stepvideo_cache_{outcome}_total", 0, cache=cache)

    def note(self, hit: bool) -> None:
        """One look-up."""
        self._metrics.add(f"stepvideo_cache_{'hits' if hit else 'misses'}_total", cache=self._cache)


def _family(name: str, declared: Family) -> Any:
    kinds = pb_utils.MetricFamily
    kind = {"counter": kinds.COUNTER, "gauge": kinds.GAUGE, "histogram": kinds.HISTOGRAM}[declared.kind]
    return kinds(name=name, description=declared.help, kind=kind)
