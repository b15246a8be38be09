"""Jobs that outlive the ranks: when the ranks were started anew, a job goes on from its last reported step."""

import logging
from collections.abc import Callable, Generator
from contextlib import closing

from stepvideo_serve.errors import RequestCancelled, WorkerFailed
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import Event, ResultEvent
from stepvideo_serve.scheduling.run_queue import QueuedRun

LOOK_S = 0.1  # how often a run that waits for the ranks looks at its cancellation and deadline

_logger = logging.getLogger(__name__)


def run_on(
    group: RankGroup, run: QueuedRun, max_resumes: int, resumed: Callable[[int], None] = lambda _: None
) -> Generator[Event, None, None]:
    """The events of the run's job, each once and in order, then its result.

    When the ranks fail, the job goes on from where it stands once they are ready again, `max_resumes` times at most;
    `resumed` hears which failure it was.
    A run that gives way ends with RequestCancelled too; called again with the same run, the job goes on.

    Raises the RequestError that ends the run: WorkerFailed with the last reason after too many failures,
    ServiceUnavailable when the ranks cannot be started anew, RequestCancelled and DeadlineExceeded also while it waits
    for them.
    """
    job = run.terms.job
    if (result := job.result()) is not None:
        yield result
        return
    for failures in range(1, max_resumes + 2):
        try:
            with closing(_attempt(group, run)) as events:
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


def _attempt(group: RankGroup, run: QueuedRun) -> Generator[Event, None, None]:
    while not group.wait_ready(LOOK_S):
        if run.cancelled.is_set() or run.parked.is_set():
            raise RequestCancelled("The request was cancelled by its caller.")
        run.remaining_s()
    job = run.terms.job
    params, tensors = job.begin()
    with group.run({**params, "timeout_s": run.remaining_s()}, tensors) as events:
        if run.cancelled.is_set() or run.parked.is_set():  # before the group had a run to cancel
            events.cancel()
        for event in events:
            if isinstance(event, ResultEvent) or job.take(event):
                yield event
