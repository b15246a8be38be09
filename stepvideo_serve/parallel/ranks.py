"""One generation of rank processes, as the parent sees them: spawned together, watched together, ended together."""

import contextlib
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from stepvideo_serve.errors import RequestError, ServiceUnavailable, SetupError, WorkerFailed
from stepvideo_serve.parallel.arena import Arena, Array, TensorEntry
from stepvideo_serve.parallel.channel import Channel, ChannelClosedError, JsonObject, encode, error_from_json

POLL_S = 0.2  # how long one look at the ranks may take: the latency of a timeout, not of a message or a death
EXIT_STATUS_S = 1.0  # from the end of a rank's channel to its exit status
TERMINATE_GRACE_S = 1.0
REAP_TIMEOUT_S = 10.0  # after SIGKILL
TRANSFER_TIMEOUT_S = 10.0  # for one message, once it has begun: a rank reads at all times
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_logger = logging.getLogger(__name__)


class RanksLostError(Exception):
    """The generation is of no use any more; the message is a sentence for the user."""


@dataclass(frozen=True)
class RanksSpec:
    """What to start: see RankGroup, whose arguments these are."""

    factory: str
    settings: Mapping[str, Any]
    size: int
    start_timeout_s: float
    arena_bytes: int
    threads_per_rank: int | None
    python: str
    env: Mapping[str, str]

    def environment(self) -> dict[str, str]:
        """The parent's environment, the additions of `env`, the thread counts; unbuffered, so that the log of a
        rank that is killed is complete."""
        threads = {} if self.threads_per_rank is None else dict.fromkeys(THREAD_VARIABLES, str(self.threads_per_rank))
        return {**os.environ, "PYTHONUNBUFFERED": "1", **threads, **self.env}


def default_python() -> str:
    """The interpreter for the ranks: this one, or the first python3 on PATH where this process is not a python.

    Inside Triton's python backend sys.executable is not the virtual environment's python, whose folder is on PATH.
    """
    if os.path.basename(sys.executable or "").startswith("python"):
        return sys.executable
    found = shutil.which("python3")
    if found is None:
        raise SetupError("A python3 must be on PATH to start the ranks, found none: add it, or give `python`.")
    return found


class RankProcess:
    """One child. Its end shows on the channel (end of stream) and on the pidfd."""

    def __init__(self, rank: int, spec: RanksSpec, inherited: tuple[int, ...]) -> None:
        self.rank = rank
        parent_end, child_end = socket.socketpair()
        with child_end, contextlib.ExitStack() as on_failure:
            on_failure.callback(parent_end.close)
            fd = child_end.fileno()
            command = [spec.python, "-m", "stepvideo_serve.parallel.worker"]
            command += ["--fd", str(fd), "--rank", str(rank), "--parent-pid", str(os.getpid())]
            self.popen = subprocess.Popen(
                command, pass_fds=(fd, *inherited), stdin=subprocess.DEVNULL, env=spec.environment()
            )
            on_failure.callback(self.popen.wait)
            on_failure.callback(self.popen.kill)
            self.pidfd = os.pidfd_open(self.popen.pid)
            self.channel = Channel(parent_end, TRANSFER_TIMEOUT_S)
            on_failure.pop_all()

    def end_sentence(self) -> str:
        """How it ended: "rank 1 was killed by SIGKILL"; a process that is cut off but still runs is killed."""
        try:
            status = self.popen.wait(EXIT_STATUS_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return f"rank {self.rank} stopped answering"
        if status >= 0:
            return f"rank {self.rank} exited with status {status}"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        return f"rank {self.rank} was killed by {name}"


class Ranks:
    """All processes of one generation, and the two arenas they share with the parent.

    `receive` is for one thread at a time; `send`, `alive` and `stop` are for any thread.
    """

    def __init__(self, spec: RanksSpec, generation: int) -> None:
        self.generation = generation
        self.info: JsonObject = {}
        self._files_lock = threading.RLock()  # nobody polls a file descriptor that is being closed
        self._closed = False
        self._poll = select.poll()
        with contextlib.ExitStack() as on_failure:
            self.jobs = Arena.create("stepvideo-jobs", spec.arena_bytes)
            on_failure.callback(self.jobs.close)
            self.results = Arena.create("stepvideo-results", spec.arena_bytes)
            on_failure.callback(self.results.close)
            self.processes: list[RankProcess] = []
            on_failure.callback(self.stop, 0.0)
            for rank in range(spec.size):
                process = RankProcess(rank, spec, (self.jobs.fd, self.results.fd))
                self.processes.append(process)
                self._poll.register(process.channel, select.POLLIN)
                self._poll.register(process.pidfd, select.POLLIN)
            on_failure.pop_all()

    @classmethod
    def started(cls, spec: RanksSpec, generation: int, spawner: Executor) -> "Ranks":
        """A generation whose ranks have all said that they are ready.

        The processes are spawned on the spawner's thread, which must outlive them: the kernel kills a child that asked
        for PR_SET_PDEATHSIG when the *thread* that spawned it ends.

        Raises ServiceUnavailable for a SetupError in a rank (with its sentence) and when start_timeout_s is over,
        WorkerFailed for any other exception or a death in a rank.
        """
        began = time.monotonic()
        try:
            ranks = spawner.submit(cls, spec, generation).result()
        except OSError as error:
            raise ServiceUnavailable(f"The ranks could not be started with {spec.python!r}: {error}.") from error
        try:
            ranks._introduce(spec)
            ranks._await_ready(spec, began + spec.start_timeout_s)
        except RanksLostError as error:
            ranks.stop(0.0)
            raise WorkerFailed(
                f"The ranks could not be started, because {error}: see the log for its last words."
            ) from error
        except BaseException:
            ranks.stop(0.0)
            raise
        _logger.info("generation %d: %d ranks ready in %.1f s", generation, spec.size, time.monotonic() - began)
        return ranks

    def alive(self) -> bool:
        """Whether no rank has ended."""
        return not self._closed and all(process.popen.poll() is None for process in self.processes)

    def send(self, message: Mapping[str, Any], only_rank: int | None = None) -> None:
        """Send to all ranks or to one; RanksLostError when one is gone, `encode`'s errors before anything is sent."""
        wire = encode(message)
        for process in self.processes if only_rank is None else [self.processes[only_rank]]:
            try:
                process.channel.send(wire)
            except ChannelClosedError as error:
                raise RanksLostError(process.end_sentence()) from error

    def receive(self, timeout_s: float) -> tuple[int, JsonObject] | None:
        """The next (rank, message), or None after timeout_s; RanksLostError when a rank has ended."""
        with self._files_lock:
            self._check_open()
            ready = {fd for fd, _ in self._poll.poll(timeout_s * 1000)}
            for process in self.processes:  # messages before deaths: a last message says more than an exit status
                if process.channel.fileno() in ready:
                    try:
                        return process.rank, process.channel.receive()
                    except ChannelClosedError as error:
                        raise RanksLostError(process.end_sentence()) from error
            for process in self.processes:
                if process.pidfd in ready:
                    raise RanksLostError(process.end_sentence())
            return None

    def read(self, entries: list[TensorEntry]) -> dict[str, Array]:
        """Copies of the tensors of a message of the leader."""
        with self._files_lock:
            self._check_open()
            return self.results.read(entries)

    def stop(self, grace_s: float) -> None:
        """End all processes, politely if there is a grace period, reap them and close every file.

        Takes at most grace_s + TERMINATE_GRACE_S + REAP_TIMEOUT_S; calling it again does nothing.
        """
        if grace_s > 0 and not self._closed:
            with contextlib.suppress(RanksLostError):  # who is gone needs no request to go
                self.send({"kind": "shutdown"})
            self._await_ends(grace_s)
            for process in self.processes:
                process.popen.terminate()
            self._await_ends(TERMINATE_GRACE_S)
        for process in self.processes:
            process.popen.kill()
        if not self._await_ends(REAP_TIMEOUT_S):
            _logger.error("generation %d: a rank is still there after SIGKILL", self.generation)
        with self._files_lock:
            if self._closed:
                return
            self._closed = True
            for process in self.processes:
                process.channel.close()
                os.close(process.pidfd)
            self.jobs.close()
            self.results.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RanksLostError("the group of ranks was closed")

    def _introduce(self, spec: RanksSpec) -> None:
        for process in self.processes:
            place = {"rank": process.rank, "world_size": spec.size, "generation": self.generation}
            start = {
                "kind": "start",
                "factory": spec.factory,
                "settings": {**spec.settings, **place},
                "arena_bytes": spec.arena_bytes,
                "job_fd": self.jobs.fd,
                "result_fd": self.results.fd,
            }
            self.send(start, only_rank=process.rank)

    def _await_ready(self, spec: RanksSpec, deadline_s: float) -> None:
        waiting = set(range(spec.size))
        while waiting:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise ServiceUnavailable(
                    f"The ranks must be ready within {spec.start_timeout_s:g} s, {len(waiting)} of {spec.size} were "
                    f"not: see the log for what they wait for, or raise start_timeout_s."
                )
            received = self.receive(min(left_s, POLL_S))
            if received is None:
                continue
            rank, message = received
            if message["kind"] == "raised":
                raise _start_error(rank, message["error"])
            waiting.discard(rank)
            if rank == 0:
                self.info = message["info"]

    def _await_ends(self, limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(deadline_s - time.monotonic(), 0.0))
        return all(process.popen.returncode is not None for process in self.processes)


def _start_error(rank: int, description: JsonObject) -> RequestError:
    if description["class"] is not None:
        return ServiceUnavailable(description["message"])
    return error_from_json(description, f"Rank {rank} failed while it started")
