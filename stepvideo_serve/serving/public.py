"""The public models: `ti2v` (decoupled: a response per step, then the result), `ti2v_unary` (the result alone), and
`ti2v_quote` (what a request would take on this server, from what the server has measured)."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from stepvideo_serve.assembly.runners import latent_channels
from stepvideo_serve.assembly.stages import describe
from stepvideo_serve.config import ENVIRONMENT_VARIABLE, ServeConfig
from stepvideo_serve.errors import InvalidRequest, QueueFull, ServiceUnavailable, WorkerFailed
from stepvideo_serve.launch.boundary import Boundary
from stepvideo_serve.launch.stopping import StopSign, shutting_down
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.pipeline.generate import Cancelled, Progress, Result, generate
from stepvideo_serve.planning.pricing import Pricing
from stepvideo_serve.planning.quote import QuoteRequest, Server, quote
from stepvideo_serve.request import (
    GenerationRequest,
    card_warnings,
    check_keep,
    check_quality,
    parse_request,
    with_timeout,
)
from stepvideo_serve.request.asked_outputs import check_asked
from stepvideo_serve.request.response_size import check_fits
from stepvideo_serve.scheduling.idempotency import Answer, fingerprint
from stepvideo_serve.serving.adapter import (
    Arrays,
    Sender,
    bytes_array,
    clear_setup_errors,
    end_process,
    is_probe,
    own_timeout_s,
    read_inputs,
    waiting_outputs,
)
from stepvideo_serve.serving.launcher_folder import results_of
from stepvideo_serve.serving.model_calls import ANSWER_S, call, in_time
from stepvideo_serve.serving.observe.request_watch import RequestWatch, RequestWatches
from stepvideo_serve.serving.observe.thread_deaths import ThreadDeaths
from stepvideo_serve.serving.previews import PREVIEW, PreviewAnswer, PreviewFiles
from stepvideo_serve.serving.remote_stages import BlsStages, report_pace
from stepvideo_serve.serving.stage_models import StageModel
from stepvideo_serve.video.decoding_room import DecodingRoom
from stepvideo_serve.video.mp4 import standard_size
from stepvideo_serve.weights.exposed import exposed

HEARTBEAT_S = 15.0

_logger = logging.getLogger(__name__)

Outputs = dict[str, np.ndarray[Any, Any]]


class PublicModel:
    """What both public models share: requests run side by side on threads; `dit_denoiser` lets one at a time at the
    ranks.

    A request is validated before it is accepted, so a bad one is answered at once however busy the server is.
    """

    decoupled: bool
    stop_sign: StopSign
    deaths: ThreadDeaths

    def initialize(self, args: dict[str, str]) -> None:
        with clear_setup_errors():
            self._config = ServeConfig.from_environment()
            Boundary.from_environment()  # without it every stage would refuse every request
            self._name, self.deaths = args["model_name"], ThreadDeaths.watched()
            self._watches = RequestWatches(self._config, args["model_name"])
            self._latent_channels = latent_channels(self._config)
            self._decoders = Layout.parse(self._config.denoiser.layout).world_size
            self._pricing = Pricing.of(self._config)
            self._description = describe(self._config)
        self._results = results_of(self._config.idempotency, args["model_name"])
        self._decoding, self._previews = DecodingRoom(), PreviewFiles()
        self._max_accepted = 1 + self._config.denoiser.max_queued
        self._accepted = self._unanswered = 0
        self.stop_sign = StopSign.from_environment()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self._max_accepted, thread_name_prefix="request")

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._take(request)

    def is_ready(self) -> bool:
        """Asked by servers from 26.03 on: not once the server is told to stop, nor without all threads."""
        return self.deaths.none and not self.stop_sign.raised()

    def finalize(self) -> None:
        self._threads.shutdown()
        self._watches.close()
        end_process()

    def _take(self, request: Any) -> None:
        try:
            if is_probe(request):
                self._answer_probe(Sender(request, self.decoupled))
                return
        except InvalidRequest as error:
            Sender(request, self.decoupled).fail(error)
            return
        watch = self._watches.begin(request)
        sender = Sender(request, self.decoupled, watch.end)
        answer: Answer = sender
        try:
            if self.stop_sign.raised():
                raise shutting_down()
            inputs = read_inputs(request)
            parsed = parse_request(inputs, self._config.limits, self._latent_channels, self._config.defaults)
            self._pricing.warning(parsed, check_quality(parsed, self._config.presets))  # may refuse
            check_keep(parsed)
            parsed = with_timeout(parsed, own_timeout_s(request), self._config.limits)
            watch.identify(parsed.request_id)
            check_asked(request.requested_output_names(), parsed.output)
            check_fits(parsed, self._latent_channels, self._frame_size(parsed))
            sender.most_bytes = parsed.max_response_bytes
            shown = parsed.preview_format if parsed.preview_every and self.decoupled else None
            answer = PreviewAnswer(sender, shown, self._previews)
            if parsed.request_id is not None:
                mark = fingerprint(inputs)
                run = self._results.join(parsed.request_id, mark, answer, parsed.timeout_s, parsed.keep_s)
                if run is None:
                    return
                answer = run
            self._accept()
            self._threads.submit(self._run, parsed, answer, watch).add_done_callback(_log_what_was_lost)
        except Exception as error:  # every error becomes this request's response
            answer.fail(error)

    def _frame_size(self, request: GenerationRequest) -> tuple[int, int]:
        """Height and width of the frames that are handed out."""
        size = (request.height, request.width)
        return standard_size(*size) if self._config.video.crop else size

    def _answer_probe(self, sender: Sender) -> None:
        self._results.forget_cancelled()  # a server without requests still has probes
        try:
            self.deaths.check(self._name)
        except WorkerFailed as error:
            sender.fail(error)
        else:
            sender.finish({"REPORT": bytes_array(json.dumps(self._state()).encode())})

    def _accept(self) -> None:
        with self._lock:
            if self._accepted >= self._max_accepted:
                raise QueueFull(
                    f"At most {self._max_accepted} requests may run or wait, {self._accepted} do: try again later."
                )
            self._accepted += 1
            self._unanswered += 1

    def _release(self) -> None:
        with self._lock:
            self._accepted -= 1

    def _state(self) -> dict[str, Any]:
        """What the launcher and health checks ask for. `accepted` counts requests until their result is known,
        `unanswered` until it is sent."""
        config = self._config
        offer = {"defaults": asdict(config.defaults), "limits": asdict(config.limits), "presets": list(config.presets)}
        fixed = {"stopping": self.stop_sign.raised(), **offer}
        with self._lock:
            return {"accepted": self._accepted, "unanswered": self._unanswered, **fixed}

    def _run(self, parsed: GenerationRequest, answer: Answer, watch: RequestWatch) -> None:
        try:
            try:
                result = self._result(parsed, answer, watch)
            finally:
                self._release()  # before the answer: a caller who has the answer may send the next request
            answer.finish(result_outputs(result))
        except Exception as error:  # every error becomes this request's response
            answer.fail(error)
        finally:
            with self._lock:
                self._unanswered -= 1

    def _result(self, parsed: GenerationRequest, answer: Answer, watch: RequestWatch) -> Result:
        with Heartbeat(answer, parsed.steps) as heartbeat:
            for event in self._events(parsed, partial(_unwanted, answer), watch):
                if isinstance(event, Result):
                    return event
                heartbeat.send(event)
        raise RuntimeError("the pipeline ended without a result")

    def _events(
        self, request: GenerationRequest, cancelled: Cancelled, watch: RequestWatch
    ) -> Iterator[Progress | Result]:
        stages = BlsStages(
            self._latent_channels,
            self._config.presets,
            self._description,
            cancelled,
            self._decoders > 1,
            request.priority,
            lambda: watch.origin,
        )
        video, gates = self._config.video, self._config.gates
        for event in generate(request, stages, video, cancelled, gates, watch.stage, self._decoding):
            if isinstance(event, Result):
                report_pace(request, event.report["seconds"], stages, self._decoders)
                event.report["warnings"] += self._card_warnings(request) + self._price_warnings(request)
            yield event

    def _card_warnings(self, request: GenerationRequest) -> list[dict[str, str]]:
        """For REPORT and the log: what the card of the checkpoint says nothing about."""
        sentences = card_warnings(request, self._config.card)
        for sentence in sentences:
            _logger.warning("card: %s", sentence)
        return [{"gate": "card", "message": sentence} for sentence in sentences]

    def _price_warnings(self, request: GenerationRequest) -> list[dict[str, str]]:
        """For REPORT and the log: that nobody has measured what the request's QUALITY costs."""
        sentence = self._pricing.warning(request, check_quality(request, self._config.presets))
        if sentence is None:
            return []
        _logger.warning("price: %s", sentence)
        return [{"gate": "price", "message": sentence}]


def _log_what_was_lost(run: Future[Any]) -> None:
    """Logs that the answer of a request could not be sent: the pool of threads does not raise the exception, and its
    thread goes on to the next request."""
    if (error := run.exception()) is not None:
        _logger.error("request_unanswered: %s", type(error).__name__, exc_info=error)


def _unwanted(answer: Answer) -> bool:
    """Whether nobody waits for the answer any more; callers who have left while others wait are answered first."""
    answer.dismiss_gone()
    return answer.cancelled()


class StreamingModel(PublicModel):
    """`ti2v`. At the start the log hears, once for all models, which of the server's files others could change."""

    decoupled = True

    def initialize(self, args: dict[str, str]) -> None:
        super().initialize(args)
        for sentence in exposed(files_of(self._config, Path(args["model_repository"]).parent)):
            _logger.warning("files: %s.", sentence)


def files_of(config: ServeConfig, model_repository: Path) -> list[Path]:
    """What decides a server's results, or is run by its processes: folders, and files outside them."""
    graphs = [] if config.model.backend == "eager" else [config.model.engines_dir]
    code = [model_repository, Path(__file__).absolute().parents[1]]
    configuration = [Path(name)] if (name := os.environ.get(ENVIRONMENT_VARIABLE)) else []
    return [config.model.dir, *graphs, *config.model.weight_set, *config.pricing.files, *configuration, *code]


class UnaryModel(PublicModel):
    """`ti2v_unary`."""

    decoupled = False


class Heartbeat:
    """Sends a request's progress, and the latest (step 0 at first) again whenever 15 s pass without any, so that a
    client can tell a slow stage or a queue from a dead server. Once its thread has died `send` and the end of the
    context raise WorkerFailed."""

    def __init__(self, answer: Answer, total_steps: int) -> None:
        self._answer = answer
        self._began_s = time.monotonic()
        self._latest = Progress(0, total_steps, 0.0, None)
        self._changed = threading.Condition()  # also keeps the responses in order
        self._sent = self._ended = False
        self._died: str | None = None  # the name of the exception that ended the thread
        self._thread = threading.Thread(target=self._watched, name="heartbeat")

    def send(self, progress: Progress) -> None:
        self._check()
        with self._changed:
            self._latest = replace(progress, preview=None)
            self._sent = True
            preview = {} if progress.preview is None else {PREVIEW: progress.preview}
            self._answer.send({**progress_outputs(progress), **preview})
            self._changed.notify()

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()
        if kind is None:
            self._check()

    def _check(self) -> None:
        if self._died is not None:
            raise WorkerFailed(f"The heartbeat of the request has failed ({self._died}): see the server's log.")

    def _watched(self) -> None:
        try:
            self._repeat()
        except BaseException as error:
            self._died = type(error).__name__
            raise  # ThreadDeaths hears of the exception

    def _repeat(self) -> None:
        with self._changed:
            while not self._ended:
                self._sent = False
                if not self._changed.wait_for(lambda: self._sent or self._ended, HEARTBEAT_S):
                    elapsed_s = time.monotonic() - self._began_s
                    self._answer.send(progress_outputs(replace(self._latest, elapsed_s=elapsed_s)))


def progress_outputs(progress: Progress) -> Outputs:
    """STEP, TOTAL_STEPS, ELAPSED_S, EVALUATIONS; while the request waits also QUEUE_POSITION and, if it is known,
    START_IN_S."""
    outputs: Outputs = {
        "STEP": np.array([progress.step], np.int32),
        "TOTAL_STEPS": np.array([progress.total_steps], np.int32),
        "ELAPSED_S": np.array([progress.elapsed_s], np.float32),
        "EVALUATIONS": np.array([progress.evaluations], np.int32),
    }
    return outputs | (waiting_outputs(progress.waiting) if progress.waiting is not None else {})


def result_outputs(result: Result) -> Outputs:
    """VIDEO or FRAMES or LATENTS, then SEED and REPORT."""
    outputs: Outputs = {
        "SEED": np.array([result.seed], np.int64),
        "REPORT": bytes_array(json.dumps(result.report).encode()),
    }
    if result.video is not None:
        outputs["VIDEO"] = bytes_array(result.video)
    if result.frames is not None:
        outputs["FRAMES"] = result.frames
    if result.latents is not None:
        outputs["LATENTS"] = result.latents
    return outputs


class QuoteModel(StageModel):
    """Sizes and steps -> SECONDS, GPU_SECONDS, PEAK_MEMORY_MIB, QUEUE_WAIT_S and the parts in REPORT."""

    internal = False

    def load(self, config: ServeConfig) -> None:
        self._config = config
        self._latent_channels = latent_channels(config)
        self._pricing = Pricing.of(config)

    def answer(self, inputs: Arrays) -> Arrays:
        asked = QuoteRequest.parse(inputs, self._config, self._latent_channels)
        warning = self._pricing.warning(asked.request, asked.preset)
        question = {"KIND": bytes_array(b"pace"), "PRIORITY": np.array([asked.request.priority], np.int32)}
        try:
            state = in_time(lambda: call("dit_denoiser", question, ("REPORT",)))
        except TimeoutError:
            raise ServiceUnavailable(
                f"dit_denoiser must answer within {ANSWER_S:g} s, it does not: see python -m stepvideo_serve health."
            ) from None
        report = quote(asked, self._server, json.loads(state["REPORT"].flat[0]))
        report["notes"] += [] if warning is None else [warning]
        return outputs_of({**report, "defaults": asdict(self._config.defaults)})

    @cached_property
    def _server(self) -> Server:
        """Counting the parameters costs seconds of CPU time, which no start should pay for."""
        return Server.of(self._config)


def outputs_of(report: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The model's outputs for a quote."""
    return {
        "SECONDS": np.array([report["seconds"]["total"]], np.float32),
        "GPU_SECONDS": np.array([report["gpu_seconds"]["total"]], np.float32),
        "PEAK_MEMORY_MIB": np.array([report["peak_memory_mib"]], np.float32),
        "QUEUE_WAIT_S": np.array([report["queue_wait_s"]], np.float32),
        "REPORT": bytes_array(json.dumps(report).encode()),
    }
