"""The metrics that the models of this server export beside Triton's own, as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stepvideo_serve.errors import RequestError
from stepvideo_serve.scheduling.run_queue import HIGH, LOW, NORMAL, URGENT

OK = "OK"
STAGES = ("image", "text", "vae_encode", "queue", "denoise", "vae_decode", "mp4", "check")
PRIORITY_NAMES: Mapping[int, str] = {URGENT: "urgent", HIGH: "high", NORMAL: "normal", LOW: "low"}

# Seconds. Steps take tens of milliseconds on the tiny checkpoint and seconds on GPUs, requests up to hours.
SHORT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
LONG_BUCKETS = (0.1, 0.5, 1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0, 7200.0)


@dataclass(frozen=True)
class Family:
    """One metric: what it counts, in which unit, told apart by which labels; buckets are upper bounds."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


FAMILIES: Mapping[str, Family] = {
    "stepvideo_requests_total": Family(
        "counter", "Requests that have ended, by the code of their answer (OK: a result)", ("model", "code")
    ),
    "stepvideo_request_seconds": Family(
        "histogram", "Seconds from the arrival of a request to its result", ("model",), LONG_BUCKETS
    ),
    "stepvideo_stage_seconds": Family(
        "histogram", "Seconds that a request spent in a stage, over all its turns", ("stage",), LONG_BUCKETS
    ),
    "stepvideo_queue_length": Family("gauge", "Runs that wait for the ranks", ("priority",)),
    "stepvideo_queue_wait_seconds": Family(
        "histogram", "Seconds that a run waited for its turn on the ranks", ("priority",), LONG_BUCKETS
    ),
    "stepvideo_running": Family("gauge", "Runs on the ranks now: 0 or 1"),
    "stepvideo_steps_total": Family("counter", "Denoising steps that have been computed"),
    "stepvideo_evaluations_total": Family("counter", "Steps of these that evaluated the DiT", ("preset",)),
    "stepvideo_forecasts_total": Family("counter", "Steps of these that took a forecast velocity", ("preset",)),
    "stepvideo_step_seconds": Family(
        "histogram", "Seconds of one denoising step that evaluated the DiT", (), SHORT_BUCKETS
    ),
    "stepvideo_flops_total": Family("counter", "Floating-point operations of all steps, by the model's formula"),
    "stepvideo_step_flops_per_second": Family("gauge", "Floating-point operations per second of the last step"),
    "stepvideo_peak_flops_per_second": Family(
        "gauge", "Peak of all ranks together, from [denoiser] peak_tflops; 0 if not configured"
    ),
    "stepvideo_preemptions_total": Family("counter", "Turns that ended because another run went first"),
    "stepvideo_resumes_total": Family(
        "counter", "Runs that went on: after a preemption, or after the ranks failed", ("after",)
    ),
    "stepvideo_heartbeat_timestamp_seconds": Family(
        "gauge", "Unix time at which the process of a model last said that it lives", ("model",)
    ),
    "stepvideo_ranks_ready": Family("gauge", "1 while all ranks are ready, else 0"),
    "stepvideo_rank_restarts_total": Family("counter", "Times the ranks were started anew after a loss"),
    "stepvideo_rank_busy_seconds_total": Family("counter", "Seconds a rank spent on runs", ("rank",)),
    "stepvideo_rank_communication_seconds_total": Family(
        "counter", "Seconds of these in which it waited for tensors of other ranks", ("rank",)
    ),
    "stepvideo_cache_hits_total": Family("counter", "Encodings taken from a cache", ("cache",)),
    "stepvideo_cache_misses_total": Family("counter", "Encodings that had to be computed", ("cache",)),
}


def codes() -> tuple[str, ...]:
    """All values of the label `code`."""
    return (OK, *sorted({kind.code for kind in RequestError.__subclasses__()}))
