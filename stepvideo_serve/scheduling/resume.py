"""Jobs that outlive the ranks: begun again where they were left, on the ranks that were started anew."""

import logging
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, Protocol

from numpy.typing import NDArray

from stepvideo_serve.errors import RequestCancelled, WorkerFailed
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import Event, ResultEvent, StepEvent
from stepvideo_serve.scheduling.run_queue import QueuedRun

LOOK_S = 0.1  # how often a run that waits for the ranks looks at its cancellation and deadline

Arrays = dict[str, NDArray[Any]]

_logger = logging.getLogger(__name__)


class Resumable(Protocol):
    """What a job knows of its own progress."""

    def begin(self) -> tuple[dict[str, Any], Arrays]:
        """Parameters and tensors of the job from where it stands."""
        ...

    def is_news(self, event: StepEvent) -> bool:
        """Note the progress; whether its consumer has not seen it yet."""
        ...

    def result(self) -> ResultEvent | None:
        """The result, where nothing is left to be computed."""
        ...

    @property
    def steps_left(self) -> int:
        """Denoising steps that are still to be computed."""
        ...


class ResumableDenoise:
    """Stands after the last step whose latents were reported. tensors["latents"] is fp32 [F, C, h, w]."""

    def __init__(self, params: dict[str, Any], tensors: Arrays) -> None:
        self._params, self._tensors = params, tensors
        self._step = 0

    def begin(self) -> tuple[dict[str, Any], Arrays]:
        return {**self._params, "start_step": self._step}, self._tensors

    def is_news(self, event: StepEvent) -> bool:
        self._step = event.params["step"]
        self._tensors = {**self._tensors, "latents": event.tensors["latents"]}
        return True

    @property
    def steps_left(self) -> int:
        return int(self._params["steps"]) - self._step

    def result(self) -> ResultEvent | None:
        if self._step < self._params["steps"]:
            return None
        return ResultEvent({}, {"latents": self._tensors["latents"]})


class Repeated:
    """A job that begins anew, and drops the reports that its consumer has: decoding, or encoding text."""

    def __init__(self, params: dict[str, Any], tensors: Arrays) -> None:
        self._params, self._tensors = params, tensors
        self._seen = self._at = 0

    def begin(self) -> tuple[dict[str, Any], Arrays]:
        self._at = 0
        return self._params, self._tensors

    def is_news(self, event: StepEvent) -> bool:  # noqa: ARG002  # chunks come in order
        self._at += 1
        news = self._at > self._seen
        self._seen = max(self._seen, self._at)
        return news

    @property
    def steps_left(self) -> int:
        return 0

    def result(self) -> ResultEvent | None:
        return None


def run_on(
    group: RankGroup, run: QueuedRun, job: Resumable, max_resumes: int, resumed: Callable[[int], None] = lambda _: None
) -> Generator[Event, None, None]:
    """The job's events, each once and in order, then its result.

    When the ranks fail, the job goes on from where it stands once they are ready again, `max_resumes` times at most;
    `resumed` hears which failure it was.
    A run that gives way ends with RequestCancelled too; called again with the same job, it goes on.

    Raises the RequestError that ends the run: WorkerFailed with the last reason after too many failures,
    ServiceUnavailable when the ranks cannot be started anew, RequestCancelled and DeadlineExceeded also while it waits
    for them.
    """
    if (result := job.result()) is not None:
        yield result
        return
    for failures in range(1, max_resumes + 2):
        try:
            with closing(_attempt(group, run, job)) as events:
                yield from events
            return
        except WorkerFailed as error:
            if (result := job.result()) is not None:
                yield result
                return
            if failures > max_resumes:
                raise WorkerFailed(f"The ranks failed {failures} times during the request, at last: {error}") from error
            _logger.warning("run %s goes on after failure %d: %s", run.run_id, failures, error)
            resumed(failures)


def _attempt(group: RankGroup, run: QueuedRun, job: Resumable) -> Generator[Event, None, None]:
    while not group.wait_ready(LOOK_S):
        if run.cancelled.is_set() or run.parked.is_set():
            raise RequestCancelled("The request was cancelled by its caller.")
        run.remaining_s()
    params, tensors = job.begin()
    with group.run({**params, "timeout_s": run.remaining_s()}, tensors) as events:
        if run.cancelled.is_set() or run.parked.is_set():  # before the group had a run to cancel
            events.cancel()
        for event in events:
            if isinstance(event, ResultEvent) or job.is_news(event):
                yield event
