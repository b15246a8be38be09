"""The group of ranks: runs one job after another on `size` processes, and is rebuilt when one of them is lost.

A job is broadcast to all ranks. The leader (rank 0) reports progress and returns the result; the job has ended when
every rank has said so, so the next one never meets a rank that still works on the last.

What goes wrong ends in bounded time:
    a rank raises a RequestError   that is the outcome; where all raise it at the same step, the group goes on
    a rank raises anything else    WorkerFailed; the others are cancelled, and have ERROR_GRACE_S to end
    a rank dies                    WorkerFailed at once
    a rank is stopped              WorkerFailed after two heartbeats; one that is only silent, after ten
    a rank is stuck in a step      WorkerFailed step_slack_s after the longest step so far, or first_step_timeout_s
    a cancel is not obeyed         RequestCancelled: the ranks are killed once cancel_grace_s is over and they are past
                                   the step in which the cancel came and the one after; the limits of a step still hold
    the parent dies                the kernel kills the ranks (rank_process.py)
Where every rank has ended the job, be it by an exception, the generation goes on. Otherwise its processes are killed,
and the ranks are started anew at once, whether or not a job waits for them. When that fails REBUILD_ATTEMPTS times in a
row the group has failed: jobs are refused at once, while it goes on trying, until it succeeds.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from stepvideo_serve.errors import RequestError, ServiceUnavailable, WorkerFailed
from stepvideo_serve.parallel.channel import JsonObject, error_from_json
from stepvideo_serve.parallel.generation import Ranks, RanksLostError, RanksSpec, default_python
from stepvideo_serve.parallel.job import Job, ResultEvent, Run, StepEvent
from stepvideo_serve.parallel.shared_memory import Array

RESERVED_SETTINGS = frozenset({"rank", "world_size", "generation", "rendezvous"})
SHUTDOWN_GRACE_S = 5.0
REBUILD_ATTEMPTS = 3
LONGEST_PAUSE_S = 30.0  # between two attempts to start a group that has failed
PROVEN_S = 10.0  # ranks that were ready for this long, or were given a job, did not fail to start

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loss:
    """Which generation was given up, why, and when (time.monotonic())."""

    generation: int
    reason: str
    noticed_s: float


class RankGroup:
    """`size` processes that each hold a worker made by `factory`, and run jobs one at a time.

    factory           "package.module:function", called in each rank with the settings; returns a Worker
    settings          JSON object; "rank", "world_size", "generation" and "rendezvous" are added for each rank
    start_timeout_s   from the start of the processes until all workers are ready
    heartbeat_s       how often each rank gives a sign of life
    first_step_timeout_s  how long a job may take until a rank's first mark; None: no limit
    step_slack_s      how much longer than the longest step so far a later one may take
    arena_bytes       shared memory in each direction, for all tensors of one message; only what is used costs memory
    threads_per_rank  OMP_NUM_THREADS, MKL_NUM_THREADS and OPENBLAS_NUM_THREADS of the ranks; None leaves them alone
    cancel_grace_s    how long the ranks may take to stop before they are killed; longer while the step in which they
                      were told lasts, which may take as long as any other
    python            the interpreter, by default what `default_python` finds
    env               additions to the environment, which the ranks otherwise inherit, as they do stdout and stderr
    """

    def __init__(
        self,
        factory: str,
        settings: Mapping[str, Any],
        *,
        size: int = 1,
        start_timeout_s: float,
        arena_bytes: int,
        threads_per_rank: int | None,
        heartbeat_s: float = 0.5,
        first_step_timeout_s: float | None = None,
        step_slack_s: float = 2.0,
        cancel_grace_s: float = 60.0,
        python: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"A group must have at least 1 rank, got {size}.")
        if clash := RESERVED_SETTINGS & settings.keys():
            raise ValueError(f"The settings must leave {', '.join(sorted(clash))} to the group: rename them.")
        self.size = size
        self.generation = 0
        """How many times the ranks have been started."""
        self.last_loss: Loss | None = None
        """The last generation that was given up, whether it had been ready or not."""
        self._cancel_grace_s = cancel_grace_s
        self._spec = RanksSpec(
            factory=factory,
            settings=dict(settings),
            size=size,
            start_timeout_s=start_timeout_s,
            heartbeat_s=heartbeat_s,
            first_step_timeout_s=first_step_timeout_s,
            step_slack_s=step_slack_s,
            arena_bytes=arena_bytes,
            threads_per_rank=threads_per_rank,
            python=python or default_python(),
            env=dict(env or {}),
        )
        self._changed = threading.Condition()  # guards the attributes below
        self._keeper: threading.Thread | None = None  # the thread that spawns the ranks and watches them
        self._ranks: Ranks | None = None  # None unless all ranks are ready
        self._failure: RequestError | None = None  # why the group has failed; None while it has not
        self._info: JsonObject = {}
        self._job: Job | None = None
        self._job_id = 0
        self._closing = threading.Event()

    @property
    def healthy(self) -> bool:
        """Whether all ranks are ready and none is lost; does not wait."""
        ranks = self._ranks
        return ranks is not None and ranks.alive()

    @property
    def silence_s(self) -> float | None:
        """How long ago the rank that has been silent for longest gave a sign of life; None while ranks are missing."""
        ranks = self._ranks
        return None if ranks is None else ranks.silence_s()

    @property
    def info(self) -> JsonObject:
        """What the leader's worker said about itself when it was ready last; empty before the start."""
        return dict(self._info)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids by rank; empty while the ranks are not ready."""
        ranks = self._ranks
        return tuple(process.popen.pid for process in ranks.processes) if ranks is not None else ()

    def start(self) -> JsonObject:
        """Start the ranks unless they are, wait until all are ready, and return the leader's info.

        Raises ServiceUnavailable for a SetupError in a rank (with its sentence), when start_timeout_s is over and when
        the group is closed, WorkerFailed for any other exception or the loss of a rank; nothing is left running then.
        Where the ranks were ready before, it is ServiceUnavailable once the group has failed; too little memory on a
        GPU, which a first start is told at once, is then tried again like a WorkerFailed.
        """
        self.wait_ready(None)
        return self.info

    def wait_ready(self, timeout_s: float | None) -> bool:
        """Like `start`, but for timeout_s at most: whether the ranks are ready."""
        with self._changed:
            self._require_open()
            if self._keeper is None:
                self._failure = None
                self._keeper = threading.Thread(target=self._keep, name="rank-keeper", daemon=True)
                self._keeper.start()
            self._changed.wait_for(lambda: self.healthy or self._failure or self._closing.is_set(), timeout_s)
            self._require_open()
            if self._failure is not None:
                raise type(self._failure)(str(self._failure))
            return self.healthy

    def run(self, params: Mapping[str, Any], tensors: Mapping[str, Array]) -> Run:
        """Give a job to all ranks and return the run to iterate over; waits for ranks that are being started.

        A cancel that comes while the job is being given to the ranks ends it, too.

        Raises InvalidRequest when the job is too large, ServiceUnavailable while another run has not ended, and what
        `start` raises.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._job is None or not self._job.cancelled)
            if self._job is None:
                self.wait_ready(None)
            ranks = self._ranks
            if self._job is not None or ranks is None:
                raise ServiceUnavailable("The ranks run one job at a time and are busy: wait until the run has ended.")
            self._job_id += 1
            job = self._job = Job(self._job_id, self.size, self._cancel_grace_s, partial(_cancel, ranks, self._job_id))
        try:
            ranks.begin_job({"kind": "job", "id": job.id, "params": params}, tensors)
        except RanksLostError as error:
            _logger.debug("job %d: %s", job.id, error)  # the keeper notices it too, and ends the job
        except BaseException:
            self._release(job)
            raise
        job.begun()
        return Run(job)

    def cancel(self) -> None:
        """Cancel the run under way, if there is one; does not wait."""
        job = self._job
        if job is not None:
            job.cancel()

    def close(self) -> None:
        """End the ranks; a run under way ends with an error. Calling it again does nothing."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
            keeper = self._keeper
        if keeper is not None:
            keeper.join()

    def _require_open(self) -> None:
        if self._closing.is_set():
            raise ServiceUnavailable("The group of ranks is closed: start the model anew.")

    def _keep(self) -> None:
        """The thread of the group. An exception that nobody foresaw ends the ranks, the job and this thread."""
        try:
            self._generations()
        except BaseException as error:
            ranks, job = self._ranks, self._job
            failure = WorkerFailed(
                f"The keeper of the ranks has failed ({type(error).__name__}): see the server's log."
            )
            self._ranks = None
            self._fail(failure, last=True)
            if job is not None:
                self._release(job)
                job.events.put(failure)
            if ranks is not None:
                ranks.stop(0.0)
            raise

    def _generations(self) -> None:
        """Starts and watches one generation after another."""
        setbacks = 0  # generations in a row that were lost before they were of use
        was_ready = False
        while not self._closing.is_set():
            job_id = self._job_id  # read before there are ranks: a job may begin before `_begin` returns
            began = self._begin()
            if isinstance(began, Ranks):
                was_ready = True
                ready_s = time.monotonic()
                failure: RequestError = WorkerFailed(f"The ranks were lost at once, because {self._watch(began)}.")
                if self._job_id > job_id or time.monotonic() - ready_s > PROVEN_S:
                    setbacks = 0
                    continue
            else:
                failure = began
                self.last_loss = Loss(self.generation, str(failure), time.monotonic())
            setbacks += 1
            if not was_ready:
                self._fail(failure, last=True)
                return
            declared = isinstance(failure, ServiceUnavailable) or setbacks >= REBUILD_ATTEMPTS
            if declared and not self._closing.is_set():
                self._fail(ServiceUnavailable(str(failure)), last=False)
                self._closing.wait(min(2.0 ** (setbacks - 1), LONGEST_PAUSE_S))

    def _begin(self) -> Ranks | RequestError:
        """The next generation, once it is ready; otherwise why it is not, and no process of it is left."""
        self.generation += 1
        began_s = time.monotonic()
        try:
            ranks = Ranks(self._spec, self.generation)
        except OSError as error:
            return ServiceUnavailable(f"The ranks could not be started with {self._spec.python!r}: {error}.")
        try:
            info = ranks.await_ready(self._closing.is_set)
        except Exception as error:
            ranks.stop(0.0)
            return _start_failure(error)
        _logger.info("generation %d: ready in %.1f s", self.generation, time.monotonic() - began_s)
        with self._changed:
            self._ranks, self._info, self._failure = ranks, info, None
            self._changed.notify_all()
        return ranks

    def _watch(self, ranks: Ranks) -> str:
        """Pass messages on until the ranks are lost or the group is closed, then end both; returns why, as a clause."""
        clause = "the group was closed"
        try:
            while not self._closing.is_set():
                self._look(ranks)
        except RanksLostError as error:
            clause = str(error)
        except Exception as error:
            _logger.exception("generation %d: a message of a rank makes no sense", ranks.generation)
            clause = f"a message of a rank makes no sense ({type(error).__name__})"
        lost = not self._closing.is_set()
        if lost:
            self.last_loss = Loss(ranks.generation, clause, time.monotonic())
            _logger.warning("generation %d is lost because %s", ranks.generation, clause)
        with self._changed:
            self._ranks = None
        ranks.stop(0.0 if lost else SHUTDOWN_GRACE_S)
        job = self._job
        if job is not None:
            closed = ServiceUnavailable("The server is shutting down: send the request to another one.")
            self._release(job)
            job.events.put(job.outcome_of_loss(clause) if lost else closed)
        return clause

    def _look(self, ranks: Ranks) -> None:
        for rank, message in ranks.receive():
            job = self._job
            if job is None or message["id"] != job.id:
                raise RanksLostError(f"rank {rank} works on a job that has ended")
            if message["kind"] == "report":
                event = StepEvent(message["params"], ranks.read(message["tensors"]))
                ranks.send({"kind": "ack", "id": job.id}, only_rank=rank)
                job.reported(event)
            elif message["kind"] == "done":
                leads = rank == 0
                job.done(rank, ResultEvent(message["params"], ranks.read(message["tensors"])) if leads else None)
            else:
                job.raised(rank, error_from_json(message["error"], f"Rank {rank} failed while it ran the request"))
            if job.ended:
                self._release(job)
                job.events.put(job.outcome())
        job = self._job
        if job is None:
            return
        stopping = job.cancelled and ranks.may_be_stopping()
        if (overdue := job.overdue(time.monotonic(), stopping)) is not None:
            raise RanksLostError(overdue)

    def _fail(self, failure: RequestError, last: bool) -> None:
        """Refuse jobs from now on: ranks could not be started. `last`: this thread will not try again."""
        if not self._closing.is_set():
            _logger.error("%s", failure)
        with self._changed:
            self._failure = failure
            self._keeper = None if last else self._keeper
            self._changed.notify_all()

    def _release(self, job: Job) -> None:
        with self._changed:
            if self._job is job:
                self._job = None
                self._changed.notify_all()

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _cancel(ranks: Ranks, job_id: int) -> None:
    with contextlib.suppress(RanksLostError):  # the keeper notices it too, and ends the job
        ranks.send({"kind": "cancel", "id": job_id})


def _start_failure(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, RanksLostError):
        return WorkerFailed(f"The ranks could not be started, because {error}: see the log for its last words.")
    _logger.error("the ranks could not be started", exc_info=error)
    return WorkerFailed(f"The ranks could not be started: {type(error).__name__}: {error}.")
