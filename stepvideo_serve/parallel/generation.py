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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepvideo_serve.errors import DeviceLost, RequestError, ServiceUnavailable, SetupError, WorkerFailed
from stepvideo_serve.parallel.channel import Channel, ChannelClosedError, JsonObject, encode, error_from_json
from stepvideo_serve.parallel.shared_memory import Arena, Array, TensorEntry
from stepvideo_serve.parallel.watchdog import DEAD_BEATS, Heartbeats, StepClock

POLL_S = 0.1  # between two looks at the clock, for timeouts; messages and deaths are noticed at once
EXIT_STATUS_S = 1.0  # from the end of a rank's channel to its exit status
TERMINATE_GRACE_S = 1.0
REAP_TIMEOUT_S = 10.0  # after SIGKILL
SEND_TIMEOUT_S = 10.0  # a rank reads at all times
STOPPED = ("T", "t", "core")  # beginnings of RankProcess.state()
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_logger = logging.getLogger(__name__)


class RanksLostError(Exception):
    """The generation is of no use any more; the message is a sentence for the user."""


@dataclass(frozen=True)
class RanksSpec:
    """The arguments of RankGroup that say what to start."""

    factory: str
    settings: Mapping[str, Any]
    size: int
    start_timeout_s: float
    heartbeat_s: float
    first_step_timeout_s: float | None
    step_slack_s: float
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
            command = [spec.python, "-m", "stepvideo_serve.parallel.rank_process"]
            command += ["--fd", str(fd), "--rank", str(rank), "--parent-pid", str(os.getpid())]
            self.popen = subprocess.Popen(
                command, pass_fds=(fd, *inherited), stdin=subprocess.DEVNULL, env=spec.environment()
            )
            on_failure.callback(self.popen.wait)
            on_failure.callback(self.popen.kill)
            self.pidfd = os.pidfd_open(self.popen.pid)
            self.channel = Channel(parent_end, SEND_TIMEOUT_S)
            on_failure.pop_all()

    def has_ended(self) -> bool:
        """Whether the process has ended, by the kernel: Popen.poll says no while another thread is about to reap it."""
        try:
            return os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # it has been reaped
            return True

    def end_sentence(self) -> str:
        """How the rank ended: "rank 1 was killed by SIGKILL". A rank without a channel that still runs is killed."""
        try:
            status = self.popen.wait(EXIT_STATUS_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return f"rank {self.rank} stopped answering"
        if status == DeviceLost.exit_status:
            return f"rank {self.rank} has lost its GPU (exit status {status})"
        if status >= 0:
            return f"rank {self.rank} exited with status {status}"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        return f"rank {self.rank} was killed by {name}"

    def state(self) -> str:
        """The state of the process by the kernel: "R (running)", "S (sleeping)", "T (stopped)", "core dump", ..."""
        try:
            lines = Path(f"/proc/{self.popen.pid}/status").read_text().splitlines()
        except OSError:
            return "gone"
        fields = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return "core dump" if fields.get("CoreDumping") == "1" else fields["State"]


class Ranks:
    """All processes of one generation, the two arenas they share with the parent, and the store by which they meet.

    The thread that makes a Ranks must outlive it (the kernel kills a child that asked for PR_SET_PDEATHSIG when the
    *thread* that spawned it ends), and calls everything but `send`, `begin_job`, `alive` and `silence_s`, which any
    thread may.
    """

    def __init__(self, spec: RanksSpec, generation: int) -> None:
        self.generation = generation
        self._spec = spec
        self._starting = True
        self._steps: StepClock | None = None
        self._jobs_lock = threading.Lock()  # so that no thread writes to an arena that is being closed
        self._closed = False
        self._poll = select.poll()
        with contextlib.ExitStack() as on_failure:
            self._jobs = Arena.create("stepvideo-jobs", spec.arena_bytes)
            on_failure.callback(self._jobs.close)
            self._results = Arena.create("stepvideo-results", spec.arena_bytes)
            on_failure.callback(self._results.close)
            self._rendezvous_fd = os.memfd_create("stepvideo-rendezvous", os.MFD_CLOEXEC)
            on_failure.callback(os.close, self._rendezvous_fd)
            self.processes: list[RankProcess] = []
            on_failure.callback(self._kill)
            for rank in range(spec.size):
                process = RankProcess(rank, spec, (self._jobs.fd, self._results.fd, self._rendezvous_fd))
                self.processes.append(process)
                self._poll.register(process.channel, select.POLLIN)
                self._poll.register(process.pidfd, select.POLLIN)
            on_failure.pop_all()
        self._looked_s = time.monotonic()
        self._beats = Heartbeats(spec.size, spec.heartbeat_s, self._looked_s)

    def await_ready(self, give_up: Callable[[], bool]) -> JsonObject:
        """Wait until all ranks have said that they are ready, and return the leader's info.

        Raises ServiceUnavailable for a SetupError in a rank (with its sentence), when start_timeout_s is over and when
        give_up(), WorkerFailed for another exception in a rank, RanksLostError when a rank has ended or is stopped.
        """
        spec = self._spec
        for process in self.processes:
            self.send(self._start_message(process.rank), only_rank=process.rank)
        deadline_s = self._looked_s + spec.start_timeout_s
        infos: dict[int, JsonObject] = {}
        while len(infos) < spec.size:
            for rank, message in self.receive():
                if message["kind"] == "raised":
                    raise _start_error(rank, message["error"])
                infos[rank] = message["info"]
            if give_up():
                raise ServiceUnavailable("The group of ranks was closed while it started: start the model anew.")
            if time.monotonic() > deadline_s:
                raise ServiceUnavailable(
                    f"The ranks must be ready within {spec.start_timeout_s:g} s, {spec.size - len(infos)} of "
                    f"{spec.size} were not: see the log for what they wait for, or raise start_timeout_s."
                )
        self._starting = False
        return infos[0]

    def silence_s(self) -> float:
        """How long ago the rank that has been silent for longest gave its last sign of life."""
        return self._beats.oldest_s(time.monotonic())

    def alive(self) -> bool:
        """Whether no rank has ended."""
        return not self._closed and not any(process.has_ended() for process in self.processes)

    def begin_job(self, message: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
        """Give all ranks a job, whose message is completed by the tensors' places.

        Raises InvalidRequest or TypeError before anything is sent, RanksLostError when a rank is gone.
        """
        with self._jobs_lock:
            if self._closed:
                raise RanksLostError("the ranks have ended")
            wire = encode({**message, "tensors": self._jobs.write(tensors)})
        spec = self._spec
        self._steps = StepClock(spec.size, spec.first_step_timeout_s, spec.step_slack_s, time.monotonic())
        self._send(wire, self.processes)

    def send(self, message: Mapping[str, Any], only_rank: int | None = None) -> None:
        """Send to all ranks or to one; RanksLostError when one is gone, `encode`'s errors before anything is sent."""
        self._send(encode(message), self.processes if only_rank is None else [self.processes[only_rank]])

    def receive(self) -> Iterator[tuple[int, JsonObject]]:
        """The messages that come within POLL_S, as (rank, message), without the signs of life.

        Raises RanksLostError, after the last messages, when a rank has ended, is silent, or is stuck in a step.
        """
        ready = {fd for fd, _ in self._poll.poll(POLL_S * 1000)}
        now_s = time.monotonic()
        self._excuse(now_s)
        ended = [process for process in self.processes if process.pidfd in ready]
        for process in self.processes:
            if not {process.channel.fileno(), process.pidfd}.isdisjoint(ready):
                try:
                    messages = process.channel.drain()
                except ChannelClosedError:
                    ended.append(process)
                    continue
                self._beats.sign(process.rank, now_s)
                yield from ((process.rank, message) for message in messages if self._is_news(process.rank, message))
        if ended:
            raise RanksLostError(ended[0].end_sentence())
        self._check_beats(now_s)
        if self._steps is not None and (stuck := self._steps.stuck(now_s)) is not None:
            raise RanksLostError(stuck)

    def read(self, entries: list[TensorEntry]) -> dict[str, Array]:
        """Copies of the tensors of a message of the leader."""
        return self._results.read(entries)

    def may_be_stopping(self) -> bool:
        """Whether ranks that were told to stop, at the first call or before, may still be in a step that they must end
        before they can; see StepClock."""
        if self._steps is None:
            return False
        self._steps.told_to_stop()
        return self._steps.may_be_stopping()

    def stop(self, grace_s: float) -> None:
        """End all processes, politely if there is a grace period, reap them and close every file.

        Takes at most grace_s + TERMINATE_GRACE_S + REAP_TIMEOUT_S; calling it again does nothing.
        """
        if self._closed:
            return
        if grace_s > 0:
            with contextlib.suppress(RanksLostError):  # a rank that has ended needs no message
                self.send({"kind": "shutdown"})
            self._await_ends(grace_s)
            for process in self.processes:
                process.popen.terminate()
            self._await_ends(TERMINATE_GRACE_S)
        self._kill()
        with self._jobs_lock:
            self._closed = True
            self._jobs.close()
        self._results.close()
        os.close(self._rendezvous_fd)

    def _send(self, wire: bytes, processes: list[RankProcess]) -> None:
        for process in processes:
            try:
                process.channel.send(wire)
            except ChannelClosedError as error:
                raise RanksLostError(process.end_sentence()) from error

    def _start_message(self, rank: int) -> JsonObject:
        place = {"rank": rank, "world_size": self._spec.size, "generation": self.generation}
        return {
            "kind": "start",
            "factory": self._spec.factory,
            "settings": {**self._spec.settings, **place},
            "heartbeat_s": self._spec.heartbeat_s,
            "arena_bytes": self._spec.arena_bytes,
            "job_fd": self._jobs.fd,
            "result_fd": self._results.fd,
            "rendezvous_fd": self._rendezvous_fd,
        }

    def _kill(self) -> None:
        for process in self.processes:
            process.popen.kill()
        if not self._await_ends(REAP_TIMEOUT_S):
            _logger.error("generation %d: a rank is still there after SIGKILL", self.generation)
        for process in self.processes:
            process.channel.close()
            os.close(process.pidfd)

    def _is_news(self, rank: int, message: JsonObject) -> bool:
        """Take signs of life and marks of steps; returns whether the message is for the job."""
        kind = message["kind"]
        if self._steps is not None:
            if kind == "mark":
                self._steps.mark(rank, time.monotonic())
            elif kind in ("done", "raised"):
                self._steps.ended(rank)
        return kind not in ("beat", "mark")

    def _excuse(self, now_s: float) -> None:
        """A parent that did not look for long cannot tell how long the ranks were silent."""
        pause_s = now_s - self._looked_s
        self._looked_s = now_s
        if pause_s > self._spec.heartbeat_s + POLL_S:
            self._beats.excuse(pause_s)
            if self._steps is not None:
                self._steps.excuse(pause_s)

    def _check_beats(self, now_s: float) -> None:
        for rank, beats in self._beats.silent(now_s).items():
            state = self.processes[rank].state()
            # While it starts, a rank may be unable to say anything for long: loading a library keeps the interpreter.
            if state.startswith(STOPPED) or (beats > DEAD_BEATS and not self._starting):
                age_s = beats * self._spec.heartbeat_s
                raise RanksLostError(f"rank {rank} gave no heartbeat for {age_s:.1f} s, its state is {state}")

    def _await_ends(self, limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(deadline_s - time.monotonic(), 0.0))
        return all(process.popen.returncode is not None for process in self.processes)


def _start_error(rank: int, description: JsonObject) -> RequestError:
    if description["class"] not in (None, WorkerFailed.__name__):
        return ServiceUnavailable(description["message"])
    return error_from_json(description, f"Rank {rank} failed while it started")
