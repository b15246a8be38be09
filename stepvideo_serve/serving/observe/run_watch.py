"""What `dit_denoiser` tells of its queue, its runs and its ranks: metrics, log events and spans."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.scheduling.run_queue import QueuedRun, QueueListener
from stepvideo_serve.serving.observe.logs import log_event
from stepvideo_serve.serving.observe.metric_families import OK, PRIORITY_NAMES
from stepvideo_serve.serving.observe.metrics import Metrics
from stepvideo_serve.serving.observe.traces import Span, Tracer

LOOK_S = 1.0
PARKED = "parked"

_logger = logging.getLogger(__name__)


class RunWatch(QueueListener):
    """Hears of every run of one queue, and of its turns on the ranks.

    flops_of        floating-point operations of one evaluated step of a run, with guidance or without
    steps_per_span  how many steps a span covers
    peak_flops      per second and of all ranks together, 0 if not known
    presets         the names that steps are counted by
    """

    def __init__(
        self,
        metrics: Metrics,
        tracer: Tracer,
        flops_of: Callable[[QueuedRun, bool], float],
        steps_per_span: int,
        peak_flops: float,
        presets: Sequence[str],
    ) -> None:
        self.metrics, self.tracer, self.flops_of, self.steps_per_span = metrics, tracer, flops_of, steps_per_span
        for priority in PRIORITY_NAMES.values():
            metrics.set("stepvideo_queue_length", 0, priority=priority)
            metrics.show("stepvideo_queue_wait_seconds", priority=priority)
        for counter in ("steps", "flops", "preemptions"):
            metrics.add(f"stepvideo_{counter}_total", 0)
        for preset in presets:
            metrics.add("stepvideo_evaluations_total", 0, preset=preset)
            metrics.add("stepvideo_forecasts_total", 0, preset=preset)
        for after in ("preemption", "rank_failure"):
            metrics.add("stepvideo_resumes_total", 0, after=after)
        for stage in ("queue", "denoise"):
            metrics.show("stepvideo_stage_seconds", stage=stage)
        metrics.show("stepvideo_step_seconds")
        self._served_s: dict[str, float] = {}  # of parked runs, by id: all their turns so far
        metrics.set("stepvideo_running", 0)
        metrics.set("stepvideo_step_flops_per_second", 0)
        metrics.set("stepvideo_peak_flops_per_second", peak_flops)

    def waiting(self, counts: Mapping[int, int]) -> None:
        for priority, name in PRIORITY_NAMES.items():
            self.metrics.set("stepvideo_queue_length", counts.get(priority, 0), priority=name)

    def began(self, run: QueuedRun, waited_s: float) -> None:
        priority = PRIORITY_NAMES[run.terms.priority]
        self.metrics.observe("stepvideo_queue_wait_seconds", waited_s, priority=priority)
        if run.state.turns > 1:
            self.metrics.add("stepvideo_resumes_total", after="preemption")
        self._waited(run, "turn_began")

    def parked(self, run: QueuedRun) -> None:
        self.metrics.add("stepvideo_preemptions_total")
        log_event(_logger, "run_parked", **_named(run), parks=run.state.parks)

    def left(self, run: QueuedRun) -> None:
        self._served_s.pop(run.run_id, None)
        self._waited(run, "run_left_queue")

    def served(self, run: QueuedRun, seconds: float, outcome: str) -> float:
        """A turn of the run has ended after `seconds`; returns the seconds of all its turns so far."""
        total_s = self._served_s.pop(run.run_id, 0.0) + seconds
        if outcome == PARKED:
            self._served_s[run.run_id] = total_s
        return total_s

    def _waited(self, run: QueuedRun, event: str) -> None:
        since_s, turns = run.state.waits_since_s, run.state.turns
        priority = PRIORITY_NAMES[run.terms.priority]
        self.tracer.span("queue", run.traceparent, since_s, priority=priority, turn=turns).end()
        log_event(_logger, event, **_named(run), turn=turns, waited_s=time.monotonic() - since_s)


class Turn:
    """One turn of a run, as a context manager while it has the ranks."""

    def __init__(self, watch: RunWatch, run: QueuedRun) -> None:
        self._watch, self._run = watch, run
        self._began_s = self._step_ended_s = time.monotonic()
        self._span: Span | None = None
        self._steps: list[int] = []  # that the open span covers
        self.outcome = PARKED
        """OK, the code of an error, or PARKED."""

    def step(self, step: int, seconds: float, preset: str, evaluated: bool, guided: bool) -> None:
        """A step of a denoising run has ended, which evaluated the DiT (with its guidance or without) or forecast."""
        metrics = self._watch.metrics
        metrics.add("stepvideo_steps_total")
        if evaluated:
            flops = self._watch.flops_of(self._run, guided)
            metrics.add("stepvideo_evaluations_total", preset=preset)
            metrics.observe("stepvideo_step_seconds", seconds)
            metrics.add("stepvideo_flops_total", flops)
            metrics.set("stepvideo_step_flops_per_second", flops / max(seconds, 1e-9))
        else:
            metrics.add("stepvideo_forecasts_total", preset=preset)
        if self._span is None:
            self._span = self._watch.tracer.span("steps", self._run.traceparent, self._step_ended_s)
        self._steps.append(step)
        self._step_ended_s = time.monotonic()
        if len(self._steps) >= self._watch.steps_per_span:
            self._end_span()

    def resumed(self, failures: int) -> None:
        """The run goes on after failure number `failures` of the ranks."""
        self._watch.metrics.add("stepvideo_resumes_total", after="rank_failure")
        log_event(_logger, "run_resumed", logging.WARNING, **_named(self._run), failures=failures)

    def failed(self, error: BaseException) -> None:
        """The error ends the run."""
        self.outcome = error.code if isinstance(error, StepVideoError) else StepVideoError.code

    def __enter__(self) -> Self:
        self._watch.metrics.set("stepvideo_running", 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end_span()
        run, seconds = self._run, time.monotonic() - self._began_s
        served_s = self._watch.served(run, seconds, self.outcome)
        if run.terms.job.kind == "denoise" and self.outcome == OK:
            self._watch.metrics.observe("stepvideo_stage_seconds", run.state.waited_s, stage="queue")
            self._watch.metrics.observe("stepvideo_stage_seconds", served_s, stage="denoise")
        log_event(_logger, "turn_ended", **_named(run), turn=run.state.turns, seconds=seconds, outcome=self.outcome)
        self._watch.metrics.set("stepvideo_running", 0)

    def _end_span(self) -> None:
        if self._span is not None:
            failure = None if self.outcome in (OK, PARKED) else self.outcome
            self._span.end(failure, first_step=self._steps[0], last_step=self._steps[-1], turn=self._run.state.turns)
            self._span, self._steps = None, []


class RankWatch:
    """Looks at the ranks every second, on a thread of its own."""

    def __init__(self, metrics: Metrics, group: RankGroup) -> None:
        self._metrics, self._group = metrics, group
        self._seen = group.generation
        self._closing = threading.Event()
        metrics.add("stepvideo_rank_restarts_total", 0)
        for rank in range(group.size):
            for kind in ("busy", "communication"):
                metrics.add(f"stepvideo_rank_{kind}_seconds_total", 0, rank=str(rank))
        self._thread = threading.Thread(target=self._loop, name="rank-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        self._thread.join()

    def used(self, rank_seconds: Mapping[str, list[float]]) -> None:
        """Seconds by rank, since the last report: "busy", and those of them in "communication"."""
        for kind, seconds in rank_seconds.items():
            for rank, value in enumerate(seconds):
                self._metrics.add(f"stepvideo_rank_{kind}_seconds_total", value, rank=str(rank))

    def _loop(self) -> None:
        while True:
            self._metrics.set("stepvideo_ranks_ready", self._group.healthy)
            generation = self._group.generation
            if generation > self._seen:
                self._metrics.add("stepvideo_rank_restarts_total", generation - self._seen)
                self._seen = generation
            if self._closing.wait(LOOK_S):
                return


def _named(run: QueuedRun) -> dict[str, Any]:
    trace = run.traceparent.split("-")
    return {
        "request_id": run.request_id,
        "trace_id": trace[1] if len(trace) >= 4 else "",
        "run_id": run.run_id,
        "kind": run.terms.job.kind,
    }
