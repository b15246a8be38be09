"""The program of one rank: `python -m stepvideo_serve.parallel.rank_process --fd N ...`, started by generation.py.

The main thread builds the worker and runs the jobs; a second thread reads the channel all the time, so that a cancel
reaches a running job and the end of the parent ends the rank. The rank cannot outlive its parent: the kernel kills it
(PR_SET_PDEATHSIG), and the end of the channel is a second reason to go. A third thread sends a heartbeat, from the
beginning on; a rank that cannot send for long (it is stopped, or a call keeps the interpreter for itself) is lost.

The leader (rank 0) may write its tensors into shared memory only when the parent has acknowledged that it has copied
the previous ones out. One slot is therefore enough, and no report can be torn: the leader computes on while the parent
reads, and waits only if it has the next report ready before the parent took the last one.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Protocol

from stepvideo_serve.errors import (
    DeviceLost,
    MemoryShortage,
    RequestCancelled,
    RequestError,
    SetupError,
    WorkerFailed,
)
from stepvideo_serve.parallel.channel import Channel, ChannelClosedError, JsonObject, encode, error_to_json
from stepvideo_serve.parallel.shared_memory import Arena, Array

LEADER = 0
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# All ranks are on this machine: NCCL connects over loopback, as gloo does (collectives.py), without InfiniBand. Tensors
# go from GPU to GPU directly.
ONE_MACHINE = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"}
# An operator may set these otherwise: NCCL logs warnings; requests of many sizes do not fragment the GPU's memory.
UNLESS_SET = {"NCCL_DEBUG": "WARN", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
BEAT = encode({"kind": "beat"})
MARK = encode({"kind": "mark"})


class Worker(Protocol):
    """What a factory returns. A factory is called with the settings, which include rank, world_size, generation and
    rendezvous (see collectives.py)."""

    def info(self) -> JsonObject:
        """Sent to the parent once the worker is ready; JSON."""

    def run(
        self, params: JsonObject, tensors: dict[str, Array], context: "JobContext"
    ) -> tuple[JsonObject, dict[str, Array]]:
        """Run one job and return the result's parameters and tensors (the leader's are used).

        The tensors are the worker's own copies. A RequestError reaches the caller as it is; any other exception as
        WorkerFailed, and in both cases the rank must be ready for the next job. A worker whose GPU is lost raises
        DeviceLost, one that cannot trust its state for another reason calls sys.exit: the rank ends without a word to
        the caller, and the parent rebuilds the group.
        """


class JobContext:
    """What a running job may ask of the rank process.

    A cancel does not reach all ranks between the same two steps: where they work in lock-step, the leader alone asks
    `cancelled` and tells the others.
    """

    def __init__(self, job_id: int, channel: Channel, results: Arena | None) -> None:
        self.job_id = job_id
        self._channel = channel
        self._results = results
        self._state = threading.Condition()
        self._cancelled = False
        self._slot_free = True

    def mark_step(self) -> None:
        """Say that a step has ended, on every rank. A job is watched by its marks: a step that takes step_slack_s
        longer than the longest so far is taken for stuck, so a job of many steps must mark each of them."""
        self._channel.send(MARK)

    def report(self, params: Mapping[str, object], tensors: Mapping[str, Array]) -> None:
        """Send progress to the caller; does nothing on the other ranks, or once the job is cancelled.

        Waits while the caller has not taken the previous report. Raises InvalidRequest for tensors that do not fit.
        """
        if self._results is not None:
            self._post(self._results, "report", params, tensors)

    def cancelled(self) -> bool:
        """Whether the caller wants the job to end."""
        return self._cancelled

    def check_cancelled(self) -> None:
        """Raise RequestCancelled if the caller wants the job to end."""
        if self._cancelled:
            raise RequestCancelled("The request was cancelled.")

    def finish(self, params: Mapping[str, object], tensors: Mapping[str, Array]) -> None:
        """Send the result; RequestCancelled if a cancel came first."""
        if self._results is None:
            self.check_cancelled()
            self._channel.send(encode({"kind": "done", "id": self.job_id, "params": {}, "tensors": []}))
        elif not self._post(self._results, "done", params, tensors):
            self.check_cancelled()

    def on_cancel(self) -> None:
        """Called by the reading thread."""
        with self._state:
            self._cancelled = True
            self._state.notify_all()

    def on_ack(self) -> None:
        """Called by the reading thread."""
        with self._state:
            self._slot_free = True
            self._state.notify_all()

    def _post(self, slot: Arena, kind: str, params: Mapping[str, object], tensors: Mapping[str, Array]) -> bool:
        """Sends a message with tensors; False after a cancel, when the arena may still be in use."""
        with self._state:
            # No time limit: the caller may be slow, and if the parent dies this process ends.
            self._state.wait_for(lambda: self._slot_free or self._cancelled)
            if self._cancelled:
                return False
        entries = slot.write(tensors)
        wire = encode({"kind": kind, "id": self.job_id, "params": params, "tensors": entries})
        self._slot_free = False  # before the send: the acknowledgement may come at once
        self._channel.send(wire)
        return True


class RankLoop:
    """Receives the parent's messages on a thread of its own and runs the jobs on the caller's."""

    def __init__(self, rank: int, channel: Channel, jobs: Arena, results: Arena) -> None:
        self._channel = channel
        self._jobs = jobs
        self._results = results if rank == LEADER else None
        self._inbox: queue.SimpleQueue[tuple[JobContext, JsonObject] | None] = queue.SimpleQueue()
        self._current: JobContext | None = None

    def start_reading(self) -> None:
        """Begin to receive."""
        threading.Thread(target=self._read, name="channel", daemon=True).start()

    def start_beating(self, heartbeat_s: float) -> None:
        """Begin to send heartbeats."""
        threading.Thread(target=self._beat, args=(heartbeat_s,), name="heartbeat", daemon=True).start()

    def serve(self, worker: Worker) -> None:
        """Run jobs until the parent says shutdown. Raises SystemExit when the GPU is lost."""
        while (item := self._inbox.get()) is not None:
            context, job = item
            try:
                params, tensors = worker.run(job["params"], self._jobs.read(job["tensors"]), context)
                context.finish(params, tensors)
            except ChannelClosedError:
                raise
            except DeviceLost as error:
                traceback.print_exc()
                raise SystemExit(error.exit_status) from error
            except Exception as error:
                if not isinstance(error, RequestError):
                    traceback.print_exc()
                self._channel.send(encode({"kind": "raised", "id": context.job_id, "error": error_to_json(error)}))

    def _beat(self, heartbeat_s: float) -> None:
        try:
            while True:
                self._channel.send(BEAT)
                time.sleep(heartbeat_s)
        except ChannelClosedError:
            return  # the reading thread notices that, too, and acts
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # ends the process, so that the parent starts the ranks anew at once

    def _read(self) -> None:
        try:
            while self._handle(self._channel.receive()):
                continue
        except ChannelClosedError:
            os._exit(1)  # the parent is gone, or does not follow the protocol
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _handle(self, message: JsonObject) -> bool:
        """Act on one message; False after the last one."""
        kind = message["kind"]
        current = self._current
        if kind == "job":
            self._current = JobContext(message["id"], self._channel, self._results)
            self._inbox.put((self._current, message))
        elif kind == "shutdown":
            if current is not None:
                current.on_cancel()
            self._inbox.put(None)
            return False
        elif current is not None and current.job_id == message["id"]:
            if kind == "cancel":
                current.on_cancel()
            elif kind == "ack":
                current.on_ack()
        return True


def build_worker(factory: str, settings: JsonObject) -> Worker:
    """Import "package.module:function" and call it. Raises SetupError when the name has another form, and WorkerFailed
    where ranks that are started anew find too little memory, or lose their GPU: the next ones may do better."""
    module, _, function = factory.partition(":")
    if not module or not function:
        raise SetupError(f'A worker factory must be given as "package.module:function", got {factory!r}.')
    try:
        worker: Worker = getattr(importlib.import_module(module), function)(settings)
    except (MemoryShortage, DeviceLost) as error:
        if settings["generation"] == 1:
            raise
        raise WorkerFailed(str(error)) from error
    return worker


def prepare_environment() -> None:
    """Sets environment variables before NCCL and torch read them. An old name, PYTORCH_CUDA_ALLOC_CONF, counts too."""
    os.environ.update(ONE_MACHINE)
    for name, value in UNLESS_SET.items():
        if name != "PYTORCH_ALLOC_CONF" or "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault(name, value)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; exit if it has ended already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        raise SystemExit("The parent process ended before this rank had started.")


def main() -> int:
    parser = argparse.ArgumentParser(description="One rank; started by stepvideo_serve.parallel.generation only.")
    for option in ("--fd", "--rank", "--parent-pid"):
        parser.add_argument(option, type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group: the parent decides
    faulthandler.enable()
    prepare_environment()
    os.set_inheritable(arguments.fd, False)
    channel = Channel(socket.socket(fileno=arguments.fd), None)  # the parent may be slow to take a message
    start = channel.receive()
    for fd in (start["job_fd"], start["result_fd"], start["rendezvous_fd"]):
        os.set_inheritable(fd, False)
    arenas = [Arena(fd, start["arena_bytes"]) for fd in (start["job_fd"], start["result_fd"])]
    loop = RankLoop(arguments.rank, channel, *arenas)
    loop.start_reading()
    loop.start_beating(start["heartbeat_s"])
    try:
        settings = {**start["settings"], "rendezvous": f"/proc/self/fd/{start['rendezvous_fd']}"}
        worker = build_worker(start["factory"], settings)
        channel.send(encode({"kind": "ready", "info": worker.info()}))
    except Exception as error:
        if not isinstance(error, SetupError):
            traceback.print_exc()
        channel.send(encode({"kind": "raised", "error": error_to_json(error)}))
        return 1
    with contextlib.suppress(ChannelClosedError):
        loop.serve(worker)
    return 0


def exit_status(program: Callable[[], int]) -> int:
    """Run the program to its end, however it ends."""
    try:
        return program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    return 1


if __name__ == "__main__":
    # The module under its own name, so that a factory that imports it sees the same classes.
    from stepvideo_serve.parallel import rank_process as this_module

    code = exit_status(this_module.main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an orderly end of interpreter and torch takes seconds of CPU time, for nothing
