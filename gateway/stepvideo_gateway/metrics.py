"""Metrics for Prometheus: answers by route, jobs by status, servers."""

import asyncio
import contextlib

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from stepvideo_gateway.errors import Unavailable
from stepvideo_gateway.jobs import ACTIVE, COMPLETED, FAILED
from stepvideo_gateway.service import Gateway


class Metrics:
    """The metrics of one gateway process."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._registry = registry = CollectorRegistry()
        self._answers = Counter(
            "stepvideo_gateway_answers_total", "HTTP answers", ("method", "route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "stepvideo_gateway_answer_seconds", "Time until an answer begins", ("method", "route"), registry=registry
        )
        self._jobs = Gauge("stepvideo_gateway_jobs", "Jobs in the database", ("status",), registry=registry)
        self._ready = Gauge(
            "stepvideo_gateway_server_ready", "Whether a server is ready", ("server",), registry=registry
        )
        self._followed = Gauge(
            "stepvideo_gateway_server_jobs",
            "Jobs that this gateway follows at a server",
            ("server",),
            registry=registry,
        )
        self._folder = Gauge(
            "stepvideo_gateway_folder_up", "Whether the folder of videos can be written", registry=registry
        )
        self._database = Gauge("stepvideo_gateway_database_up", "Whether the database answers", registry=registry)

    def note(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts one answer."""
        self._answers.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    async def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        for worker in self._gateway.dispatcher.workers:
            self._ready.labels(worker.url).set(worker.ready)
            self._followed.labels(worker.url).set(worker.running)
        self._folder.set(0)
        with contextlib.suppress(Unavailable):
            await asyncio.to_thread(self._gateway.store.check)
            self._folder.set(1)
        self._database.set(0)
        with contextlib.suppress(Unavailable):
            counts = await self._gateway.jobs.counts()
            self._database.set(1)
            for status in (*ACTIVE, COMPLETED, FAILED):
                self._jobs.labels(status).set(counts.get(status, 0))
        return generate_latest(self._registry)
