"""The model `dit_denoiser`: queues runs, and drives the group of ranks that computes them.

KIND says what a run is: "denoise" (the default: a response per step, then latents), and for layouts of several ranks
"decode" (frames chunk by chunk) and "text" (llm_states of input_ids). Decoding and text belong to a request that is
under way or about to be, so they go before the denoising runs that wait.

Two kinds are no runs and are answered at once: "pace" (REPORT: what the server has measured, how long a run of PRIORITY
would wait, and how the ranks are) and "note" (adds the measurements in NOTE, {stage: [work, seconds]}, to the ledger).
"""

import json
import os
from contextlib import closing
from typing import Any

import numpy as np

from stepvideo_serve.config import ENVIRONMENT_VARIABLE, ServeConfig
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.errors import InvalidRequest, RequestCancelled
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import ResultEvent, StepEvent
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.parallel.watchdog import DEAD_BEATS
from stepvideo_serve.planning.evaluations import RunPace
from stepvideo_serve.planning.pace import Pace, TurnPace
from stepvideo_serve.request import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL, checked_settings, chosen_preset
from stepvideo_serve.request.presets import MASK, preset_name
from stepvideo_serve.scheduling.progress import Repeated, Resumable, ResumableDenoise
from stepvideo_serve.scheduling.resume import run_on
from stepvideo_serve.scheduling.run_queue import URGENT, QueuedRun, QueueRules, RunQueue, RunTerms
from stepvideo_serve.serving.adapter import Arrays, bytes_array, clear_setup_errors
from stepvideo_serve.serving.observe.logs import configure_logging
from stepvideo_serve.serving.observe.metric_families import OK
from stepvideo_serve.serving.observe.metrics import Heartbeats, Metrics
from stepvideo_serve.serving.observe.run_watch import RankWatch, RunWatch, Turn
from stepvideo_serve.serving.observe.traces import Tracer
from stepvideo_serve.serving.queued_model import QueuedModel
from stepvideo_serve.serving.stage_bounds import read_note

RANK_FACTORY = "stepvideo_serve.serving.rank_factory:build_rank"
TENSORS = {
    "denoise": ("latents", "condition", "positive_llm", "positive_clip", "negative_llm", "negative_clip"),
    "decode": ("latents",),
    "text": ("input_ids",),
}
"""Kind of a run -> the tensors of its job, all but the negative branch's required; the names are the ranks' own."""


class DenoiserModel(QueuedModel):
    """Owns the queue and the ranks. The ranks are child processes: what kills one never kills this model."""

    rank_factory = RANK_FACTORY
    """What builds a rank's worker, as "package.module:function"; a benchmark sets another one."""

    def initialize(self, args: dict[str, str]) -> None:
        with clear_setup_errors():
            config = ServeConfig.from_environment()
            configure_logging(config.logging, "dit_denoiser", in_stub=True)
            self.prepare(args["model_name"], config)
            self._tracer = Tracer(config.telemetry, "dit_denoiser")
            layout = Layout.parse(config.denoiser.layout)
            ranks = layout.world_size
            self._limits, self._presets = config.limits, config.presets
            self._max_resumes = config.denoiser.max_resumes
            self._group = RankGroup(
                self.rank_factory,
                {"config": os.environ[ENVIRONMENT_VARIABLE]},
                size=ranks,
                start_timeout_s=config.denoiser.start_timeout_s,
                heartbeat_s=config.denoiser.heartbeat_s,
                first_step_timeout_s=config.denoiser.first_step_timeout_s,
                step_slack_s=config.denoiser.step_slack_s,
                arena_bytes=config.denoiser.arena_mib << 20,
                threads_per_rank=config.denoiser.threads or max(usable_cores() // ranks, 1),
            )
            self._group.start()
        self._heartbeat_s = config.denoiser.heartbeat_s
        dit = DiTConfig.load(config.model.dir / "transformer" / "config.json")  # without torch
        self._pace = Pace(dit, skips_branches=layout.cfg == 1)
        self._run_pace = RunPace(self._pace, config.presets)
        self._turn_pace: TurnPace | None = None  # of the latest run that had a turn
        rules = QueueRules(
            config.denoiser.max_queued,
            config.denoiser.max_parks,
            config.denoiser.aging_s,
            max_urgent=self.bounds.max_runs,
        )
        metrics = Metrics()
        self._beats = Heartbeats(metrics, "dit_denoiser")
        self._ranks_watch = RankWatch(metrics, self._group)
        self._watch = RunWatch(
            metrics,
            self._tracer,
            lambda run, guided: self._pace.step_flops(run.terms.job.tensors, guided),
            config.telemetry.steps_per_span,
            config.denoiser.peak_tflops * 1e12 * ranks,
            (*config.presets, MASK),
        )
        self.queue = RunQueue(rules, self._serve, self._group.cancel, self._seconds_of, self._watch, self._stop_seconds)

    def is_ready(self) -> bool:
        """Asked by servers from 26.03 on: not while ranks that were lost are started anew, nor when one is silent."""
        silence_s = self._group.silence_s
        return (
            super().is_ready()
            and self._group.healthy
            and silence_s is not None
            and silence_s < DEAD_BEATS * self._heartbeat_s
        )

    def probed(self) -> Arrays:
        """REPORT of a run of normal priority."""
        return {"REPORT": bytes_array(json.dumps(self._state({})).encode())}

    def answer_at_once(self, inputs: Arrays) -> Arrays | None:
        kind = _kind(inputs)
        if kind == "note":
            self._take_note(inputs)
            return {}
        return {"REPORT": bytes_array(json.dumps(self._state(inputs)).encode())} if kind == "pace" else None

    def describe_run(self, inputs: Arrays) -> RunTerms:
        kind = _kind(inputs)
        if kind not in TENSORS:
            raise InvalidRequest(f"KIND must be one of {', '.join(TENSORS)}, got {kind[:40]!r}: correct it.")
        required = ("SETTINGS", *TENSORS[kind][:4]) if kind == "denoise" else TENSORS[kind]
        missing = [name for name in required if name not in inputs]
        if missing:
            raise InvalidRequest(f"A run needs {missing[0]}, got none: call the model ti2v instead.")
        timeout_s = _finite(inputs, "TIMEOUT_S") if "TIMEOUT_S" in inputs else None
        tensors = {name: inputs[name] for name in TENSORS[kind] if name in inputs}
        if "latents" in tensors:
            self.bounds.check_latents(tensors)
        self.tensor_bounds.check(tensors)
        if kind != "denoise":
            return RunTerms(Repeated(kind, tensors), URGENT, timeout_s)
        settings = checked_settings(_json_object(inputs, "SETTINGS"), self._limits)
        chosen_preset(settings, self._presets)  # refused here, before the run waits
        job = ResumableDenoise({"kind": kind, "settings": settings}, tensors, int(settings["steps"]))
        return RunTerms(job, _priority(inputs), timeout_s, parkable=True)

    def finalize(self) -> None:
        self.queue.close()
        self._ranks_watch.close()
        self._beats.close()
        self._group.close()
        self._tracer.close()
        super().finalize()

    def _state(self, inputs: Arrays) -> dict[str, Any]:
        """What `ti2v_quote` and health checks ask for."""
        waiting, wait_s = self.queue.forecast(_priority(inputs))
        group = self._group
        return {
            "rates": self._pace.ledger.points(),
            "evaluations": self._run_pace.counts.points(),
            "waiting": waiting,
            "wait_s": wait_s,
            "ranks": group.size,
            "ranks_ready": group.healthy,
            "silence_s": group.silence_s,
            "generation": group.generation,
            "silence_limit_s": DEAD_BEATS * self._heartbeat_s,
        }

    def _take_note(self, inputs: Arrays) -> None:
        for stage, (work, seconds) in read_note(inputs["NOTE"].flat[0] if "NOTE" in inputs else b"").items():
            self._pace.ledger.note(stage, work, seconds)

    def _serve(self, run: QueuedRun) -> bool:
        job = run.terms.job
        pace = self._turn_pace = TurnPace(self._pace, job.tensors)
        with Turn(self._watch, run) as turn:
            try:
                with closing(run_on(self._group, run, self._max_resumes, turn.resumed)) as events:
                    for event in events:
                        self._note(turn, pace, job, event)
                        outputs = self._outputs(job.kind, event)
                        if outputs:
                            run.answer.send(outputs)
                turn.outcome = OK
            except Exception as error:  # every error becomes this run's response
                if isinstance(error, RequestCancelled) and run.gives_way:
                    return False
                turn.failed(error)
                run.answer.fail(error)
            run.answer.close()
            return True

    def _note(self, turn: Turn, pace: TurnPace, job: Resumable, event: StepEvent | ResultEvent) -> None:
        """Tells the pace and the metrics what an event of a denoising run says."""
        if not isinstance(job, ResumableDenoise):
            return
        if isinstance(event, StepEvent):
            seconds, evaluated, guided = (event.params[name] for name in ("seconds", "evaluated", "guided"))
            pace.step(seconds, evaluated, guided)
            turn.step(event.params["step"], seconds, preset_name(str(job.settings["quality"])), evaluated, guided)
        else:
            self._run_pace.ended(job)
        if isinstance(event, ResultEvent) and "rank_seconds" in event.params:
            self._ranks_watch.used(event.params["rank_seconds"])

    def _seconds_of(self, run: QueuedRun) -> float | None:
        """Seconds of the denoising steps that are left; 0 for decoding and text, which are short beside those."""
        job = run.terms.job
        return self._run_pace.seconds_left(job) if isinstance(job, ResumableDenoise) else 0.0

    def _stop_seconds(self, run: QueuedRun) -> float | None:
        """Seconds until the step under way ends: there a run stops that was cancelled or must give way."""
        pace = self._turn_pace
        if run.terms.job.kind != "denoise":
            return 0.0
        return None if pace is None else pace.step_left_s()

    def _outputs(self, kind: str, event: StepEvent | ResultEvent) -> dict[str, Any]:
        """The part of an event that the caller gets."""
        if kind == "decode":
            return {"frames": event.tensors["frames"]} if "frames" in event.tensors else {}
        if kind == "text":
            return {"llm_states": event.tensors["llm_states"]}
        if isinstance(event, ResultEvent):
            settings = {"settings": event.params["settings"]} if "settings" in event.params else {}
            report = json.dumps({**self._group.info, **settings}).encode()
            return {"latents": event.tensors["latents"], "REPORT": bytes_array(report)}
        outputs = {
            "STEP": np.array([event.params["step"]], np.int32),
            "TOTAL_STEPS": np.array([event.params["total_steps"]], np.int32),
            "STEP_SECONDS": np.array([event.params["seconds"]], np.float32),
            "EVALUATIONS": np.array([event.params["evaluations"]], np.int32),
        }
        return {**outputs, "preview": event.tensors["preview"]} if "preview" in event.tensors else outputs


def _json_object(inputs: Arrays, name: str) -> dict[str, Any]:
    try:
        found = json.loads(inputs[name].flat[0])
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidRequest(f"{name} must be a JSON object, got: {error}; call the model ti2v instead.") from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"{name} must be a JSON object, got {type(found).__name__}: correct it.")
    return found


def _kind(inputs: Arrays) -> str:
    return str(inputs["KIND"].flat[0].decode(errors="replace")) if "KIND" in inputs else "denoise"


def _priority(inputs: Arrays) -> int:
    priority = int(inputs["PRIORITY"].flat[0]) if "PRIORITY" in inputs else PRIORITY_NORMAL
    if not PRIORITY_HIGH <= priority <= PRIORITY_LOW:
        raise InvalidRequest(f"PRIORITY must be {PRIORITY_HIGH} to {PRIORITY_LOW}, got {priority}: correct it.")
    return priority


def _finite(inputs: Arrays, name: str) -> float:
    value = float(inputs[name].flat[0])
    if not np.isfinite(value):
        raise InvalidRequest(f"{name} must be finite, got {value}: correct it.")
    return value
