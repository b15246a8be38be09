"""The requests of a model that answers each with one response, worked off on a thread of its own, so that probes and
cancels are answered meanwhile. Free of Triton, for tests.

A request may carry a name (CALL_ID), by which its caller can give it up (CANCEL_CALL): servers before 25.04 cannot
cancel one model's call of another.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from stepvideo_serve.engine.device_errors import device_errors
from stepvideo_serve.errors import RequestCancelled, WorkerFailed
from stepvideo_serve.launch.health import LOST_THREAD

CALL_ID = "call_id"
CANCEL_CALL = "cancel_call"
STUCK_S = 120.0  # the longest that a task may work in this process, waits for other processes aside

Arrays = Mapping[str, NDArray[Any]]


class Reply(Protocol):
    """The one response to a request."""

    def finish(self, outputs: Arrays) -> None: ...
    def fail(self, error: BaseException) -> None: ...


@dataclass(frozen=True, eq=False)
class Task:
    """One request; `call_id` is its name, "" without one."""

    inputs: Arrays
    reply: Reply
    call_id: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)


class StageWork:
    """Answers one task after the other with `answer`, whose exceptions become the reply. Any thread may call. device:
    what `answer` computes on; None: the current GPU."""

    def __init__(
        self, answer: Callable[[Arrays], Arrays], stuck_s: float = STUCK_S, device: torch.device | None = None
    ) -> None:
        self._answer, self._stuck_s, self._device = answer, stuck_s, device
        self._tasks: deque[Task] = deque()  # the first is under way
        self._changed = threading.Condition()
        self._since_s: float | None = None  # time.monotonic() since which a task works in this process
        threading.Thread(target=self._work, name="stage-work", daemon=True).start()

    def put(self, task: Task) -> None:
        """Adds the task behind those that were put before."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()

    def cancel(self, call_id: str) -> None:
        """Gives the task of that name up, where there is one. A task that waits is answered now; the task under way
        finds out by `cancelled`."""
        with self._changed:
            given_up = [task for task in self._tasks if task.call_id == call_id]
            for task in given_up:
                task.cancelled.set()
            waiting = [task for task in given_up if task is not self._tasks[0]]
            for task in waiting:
                self._tasks.remove(task)
        for task in waiting:
            task.reply.fail(_cancelled())

    def cancelled(self) -> bool:
        """For `answer`: whether the task under way was given up."""
        return self._tasks[0].cancelled.is_set()

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """For `answer`, around a wait for another process: that time does not count for `stuck_s`."""
        self._since_s = None
        try:
            yield
        finally:
            self._since_s = time.monotonic()

    def check(self, model: str) -> None:
        """Raises WorkerFailed, in the words that the health check looks for, once the work is stuck."""
        since_s = self._since_s
        if since_s is not None and (took_s := time.monotonic() - since_s) > self._stuck_s:
            raise WorkerFailed(f"{model} {LOST_THREAD}, stuck in a request for {took_s:.0f} s: load the model anew.")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks)
                task = self._tasks[0]
            try:
                self._do(task)
            finally:
                with self._changed:
                    self._since_s = None
                    self._tasks.popleft()

    def _do(self, task: Task) -> None:
        self._since_s = time.monotonic()
        try:
            if task.cancelled.is_set():
                raise _cancelled()
            with device_errors(self._device):
                task.reply.finish(self._answer(task.inputs))
        except Exception as error:  # every error becomes this request's response
            task.reply.fail(error)


def _cancelled() -> RequestCancelled:
    return RequestCancelled("The request was cancelled by its caller.")
