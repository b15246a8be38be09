"""The group of ranks: runs one job after another on `size` processes, and is rebuilt when one of them dies.

A job is broadcast to all ranks. The leader (rank 0) reports progress and returns the result; the job has ended when
every rank has said so, so the next one never meets a rank that still works on the last.

What goes wrong ends in bounded time:
    a rank raises                 the others are cancelled; the group goes on, unless they do not end in cancel_grace_s
    a rank dies                   WorkerFailed at once; the rest is killed; rebuilt before the next job
    a rank says nothing           the same after silence_timeout_s, where one is set
    a cancel is not obeyed        RequestCancelled after cancel_grace_s; killed and rebuilt
    the parent dies               the kernel kills the ranks (worker.py)
"""

import logging
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from stepvideo_serve.errors import RequestCancelled, RequestError, ServiceUnavailable, WorkerFailed
from stepvideo_serve.parallel.arena import Array
from stepvideo_serve.parallel.channel import JsonObject, error_from_json
from stepvideo_serve.parallel.ranks import POLL_S, Ranks, RanksLostError, RanksSpec, default_python

RESERVED_SETTINGS = frozenset({"rank", "world_size", "generation"})
SHUTDOWN_GRACE_S = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepEvent:
    """A report of the leader; the arrays belong to whoever receives the event."""

    params: JsonObject
    tensors: dict[str, Array]


@dataclass(frozen=True)
class ResultEvent:
    """The result, the last event of a run; the arrays belong to whoever receives the event."""

    params: JsonObject
    tensors: dict[str, Array]


Event = StepEvent | ResultEvent


class Run(Iterator[Event]):
    """One job under way: iterate over it to receive the StepEvents and, last, the ResultEvent.

    One thread iterates; any thread may cancel. Leaving early (close, or dropping the object) cancels the job and waits
    until the ranks have let go of it.

    Iteration raises the RequestError that a rank raised, RequestCancelled after a cancel, and WorkerFailed when a rank
    raised something else or died.
    """

    def __init__(self, group: "RankGroup", ranks: Ranks, job_id: int) -> None:
        self._group = group
        self._ranks = ranks
        self._job_id = job_id
        self._running = set(range(group.size))
        self._result: ResultEvent | None = None
        self._error: RequestError | None = None
        self._cancelled = False
        self._stop_asked_s: float | None = None  # time.monotonic() when the ranks were told to stop
        self._ended = False

    def __iter__(self) -> "Run":
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        try:
            event = self._next_event()
        except RanksLostError as error:
            self._end(lost=True)
            if self._cancelled:
                raise RequestCancelled("The request was cancelled.") from error
            raise WorkerFailed(f"The request failed because {error}: send it again.") from error
        except RequestError:
            self._end(lost=False)
            raise
        except BaseException:
            self._end(lost=True)  # interrupted somewhere between two messages
            raise
        if isinstance(event, ResultEvent):
            self._end(lost=False)
        return event

    def cancel(self) -> None:
        """Tell the ranks to stop; does nothing when the run has ended."""
        self._cancelled = True
        self._stop()

    def close(self) -> None:
        """Cancel the run if it has not ended, and wait for its end, for cancel_grace_s at most."""
        if not self._ended:
            self.cancel()
            try:
                for _ in self:
                    continue
            except RequestError as error:
                _logger.info("job %d was given up: %s", self._job_id, error)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _next_event(self) -> Event:
        while self._running:
            rank, message = self._receive()
            if message["kind"] == "report":
                event = StepEvent(message["params"], self._ranks.read(message["tensors"]))
                self._ranks.send({"kind": "ack", "id": self._job_id}, only_rank=rank)
                if self._stop_asked_s is None:
                    return event
            elif message["kind"] == "done":
                self._running.discard(rank)
                if rank == 0:
                    self._result = ResultEvent(message["params"], self._ranks.read(message["tensors"]))
            else:
                self._running.discard(rank)
                self._error = self._error or error_from_json(
                    message["error"], f"Rank {rank} failed while it ran the request"
                )
                if self._running:
                    self._stop()
        if self._cancelled:
            raise RequestCancelled("The request was cancelled.")
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise RanksLostError("the leader ended without a result")
        return self._result

    def _receive(self) -> tuple[int, JsonObject]:
        """The next message, or RanksLostError: a rank died, is silent, or does not obey a stop."""
        began_s = time.monotonic()
        grace_s, silence_s = self._group.cancel_grace_s, self._group.silence_timeout_s
        while (received := self._ranks.receive(POLL_S)) is None:
            now_s = time.monotonic()
            who = f"ranks {sorted(self._running)}"
            if self._stop_asked_s is not None and now_s > self._stop_asked_s + grace_s:
                because = f" after: {self._error}" if self._error else ""
                raise RanksLostError(f"{who} did not stop within {grace_s:g} s{because}")
            if silence_s is not None and now_s > began_s + silence_s:
                raise RanksLostError(f"{who} gave no sign for {silence_s:g} s")
        return received

    def _stop(self) -> None:
        if self._ended or self._stop_asked_s is not None:
            return
        self._stop_asked_s = time.monotonic()
        try:
            self._ranks.send({"kind": "cancel", "id": self._job_id})
        except RanksLostError as error:
            _logger.debug("job %d: %s", self._job_id, error)  # the iteration notices it too, and acts

    def _end(self, lost: bool) -> None:
        self._ended = True
        self._group.release(self._job_id, self._ranks if lost else None)


class RankGroup:
    """`size` processes that each hold a worker made by `factory`, and run jobs one at a time.

    factory           "package.module:function", called in each rank with the settings; returns a Worker (worker.py)
    settings          JSON object; "rank", "world_size" and "generation" are added for each rank
    start_timeout_s   from the start of the processes until all workers are ready
    arena_bytes       shared memory in each direction, for all tensors of one message; only what is used costs memory
    threads_per_rank  OMP_NUM_THREADS, MKL_NUM_THREADS and OPENBLAS_NUM_THREADS of the ranks; None leaves them alone
    cancel_grace_s    how long the ranks may take to stop (at least one step) before they are killed
    silence_timeout_s how long a running job may give no report before the ranks are killed; None: no limit
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
        cancel_grace_s: float = 60.0,
        silence_timeout_s: float | None = None,
        python: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"A group must have at least 1 rank, got {size}.")
        if clash := RESERVED_SETTINGS & settings.keys():
            raise ValueError(f"The settings must leave {', '.join(sorted(clash))} to the group: rename them.")
        self.size = size
        self.cancel_grace_s = cancel_grace_s
        self.silence_timeout_s = silence_timeout_s
        self.generation = 0
        """How many times the ranks have been started."""
        self._spec = RanksSpec(
            factory, dict(settings), size, start_timeout_s, arena_bytes, threads_per_rank,
            python or default_python(), dict(env or {}),
        )  # fmt: skip
        self._lock = threading.RLock()
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="rank-spawner")  # lives as long as the group
        self._ranks: Ranks | None = None
        self._run: weakref.ref[Run] | None = None  # weak, so that a run that its consumer dropped ends by __del__
        self._job_id = 0
        self._busy = False
        self._closed = False

    @property
    def healthy(self) -> bool:
        """Whether the ranks are started and none has ended; does not wait, not even for a start under way."""
        ranks = self._ranks
        return ranks is not None and ranks.alive()

    @property
    def info(self) -> JsonObject:
        """What the leader's worker said about itself; empty before the start."""
        ranks = self._ranks
        return dict(ranks.info) if ranks is not None else {}

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids by rank; empty while there are none."""
        ranks = self._ranks
        return tuple(process.popen.pid for process in ranks.processes) if ranks is not None else ()

    def start(self) -> JsonObject:
        """Start the ranks, wait until all are ready, and return the leader's info.

        Raises ServiceUnavailable or WorkerFailed (see Ranks.started); nothing is left running then.
        """
        return dict(self._started().info)

    def ensure_started(self) -> None:
        """Start the ranks unless they are there and alive; raises what `start` raises."""
        self._started()

    def run(self, params: Mapping[str, Any], tensors: Mapping[str, Array]) -> Run:
        """Give a job to all ranks and return the run to iterate over; starts the ranks if need be.

        The job has begun when this returns, so a cancel that comes later is never lost.

        Raises InvalidRequest when the job is too large, ServiceUnavailable while another run has not ended, and what
        `start` raises.
        """
        with self._lock:
            if self._busy:
                raise ServiceUnavailable("The ranks run one job at a time and are busy: wait until the run has ended.")
            ranks = self._started()
            self._job_id += 1
            try:
                ranks.send({"kind": "job", "id": self._job_id, "params": params, "tensors": ranks.jobs.write(tensors)})
            except RanksLostError as error:
                self._drop(ranks)
                raise WorkerFailed(f"The request could not begin because {error}: send it again.") from error
            run = Run(self, ranks, self._job_id)
            self._run = weakref.ref(run)
            self._busy = True
            return run

    def cancel(self) -> None:
        """Cancel the run under way, if there is one; does not wait."""
        run = self._run() if self._run is not None else None
        if run is not None:
            run.cancel()

    def close(self) -> None:
        """End the ranks; a run under way ends with an error. Calling it again does nothing."""
        with self._lock:
            self._closed = True
            ranks, self._ranks = self._ranks, None
            if ranks is not None:
                ranks.stop(SHUTDOWN_GRACE_S)
            self._spawner.shutdown()

    def release(self, job_id: int, lost: Ranks | None) -> None:
        """Called by a run when it ends, with its ranks if they are of no use any more."""
        with self._lock:
            if lost is not None:
                self._drop(lost)
            if job_id == self._job_id:
                self._busy = False

    def _started(self) -> Ranks:
        with self._lock:
            if self._closed:
                raise ServiceUnavailable("The group of ranks is closed: start the model anew.")
            if self._ranks is not None and not self._ranks.alive():
                _logger.warning("generation %d: a rank has ended, starting anew", self._ranks.generation)
                self._drop(self._ranks)
            if self._ranks is None:
                self.generation += 1
                self._ranks = Ranks.started(self._spec, self.generation, self._spawner)
            return self._ranks

    def _drop(self, ranks: Ranks) -> None:
        ranks.stop(0.0)
        if self._ranks is ranks:
            self._ranks = None

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
