"""Requests that are repeated: one run answers all that have the same REQUEST_ID, and its result is kept for a while.

A request is repeated by a client that lost its connection, or gave up too early. While its run is under way, the repeat
attaches to it: every caller gets the progress and the result; a caller that cancels leaves the others alone, and the
last one to leave ends the run. Afterwards, a repeat gets the kept result. Failures are not kept: a repeat runs again.
"""

import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import DeadlineExceeded, InvalidRequest, QueueFull, RequestCancelled

Outputs = Mapping[str, NDArray[Any]]

# What a repeat may change: it decides how the result is waited for, not what it is.
FREE_INPUTS = ("REQUEST_ID", "REQUEST_PRIORITY", "TIMEOUT_S", "PREVIEW_EVERY", "MAX_RESPONSE_BYTES")
MAX_CALLERS = 16  # that may wait for one run

_logger = logging.getLogger(__name__)


class Answer(Protocol):
    """Where the responses to one request go: `serving.adapter.Sender`, or a SharedAnswer in its place.

    Whoever computes calls `dismiss_gone` from time to time, then asks `cancelled`.
    """

    def send(self, outputs: Outputs) -> None: ...
    def finish(self, outputs: Outputs) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def cancelled(self) -> bool: ...
    def dismiss_gone(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Caller:
    """Who asked; `timeout_s` None: without a deadline. A `repeated` one hears so in REPORT."""

    answer: Answer
    timeout_s: float | None
    accepted_s: float
    repeated: bool

    def gone(self, now_s: float) -> RequestCancelled | DeadlineExceeded | None:
        """Why the caller does not wait any more."""
        if self.answer.cancelled():
            return RequestCancelled("The request was cancelled by its caller.")
        if self.timeout_s is not None and now_s - self.accepted_s > self.timeout_s:
            return DeadlineExceeded(
                f"The video must be ready within TIMEOUT_S = {self.timeout_s:g}, which ran out: send the request "
                "again with the same REQUEST_ID and more time."
            )
        return None


class SharedAnswer:
    """The answer of one run to every caller with its id. Any thread may call any method."""

    def __init__(
        self,
        keep: Callable[["SharedAnswer", Outputs | None], None],
        request_id: str,
        mark: bytes,
        clock: Callable[[], float],
    ) -> None:
        self.request_id, self.mark = request_id, mark
        self._keep, self._clock = keep, clock
        self._callers: list[Caller] = []
        self._latest: Outputs | None = None
        self._abandoned = False
        self._lock = threading.RLock()

    def attach(self, caller: Caller) -> bool:
        """Adds a caller, who hears at once how far the run is; False when all others have left, so that it ends.

        Raises QueueFull when MAX_CALLERS wait for it.
        """
        with self._lock:
            if self._abandoned:
                return False
            if len(self._callers) >= MAX_CALLERS:
                raise QueueFull(
                    f"At most {MAX_CALLERS} requests may wait for one run, {len(self._callers)} with the REQUEST_ID "
                    f"{self.request_id!r} do: close those that nobody reads."
                )
            self._callers.append(caller)
            if self._latest is not None:
                caller.answer.send(self._latest)
            return True

    def send(self, outputs: Outputs) -> None:
        """Sends progress to all."""
        with self._lock:
            self._latest = {name: value for name, value in outputs.items() if name != "PREVIEW"}
            self._to_all(lambda caller: caller.answer.send(outputs))

    def finish(self, outputs: Outputs) -> None:
        """Sends the result to all, and keeps it."""
        self._keep(self, outputs)  # before anyone has it: whoever has it may send the request again
        again = repeated(outputs)
        self._to_all(lambda caller: caller.answer.finish(again if caller.repeated else outputs))

    def fail(self, error: BaseException) -> None:
        """Sends the error to all; those who have left by then hear that."""
        self._keep(self, None)
        self._to_all(lambda caller: caller.answer.fail(caller.gone(self._clock()) or error))

    def cancelled(self) -> bool:
        """Whether all callers had left when `dismiss_gone` was called last."""
        return self._abandoned

    def dismiss_gone(self) -> None:
        """Answers the callers who have left, while others wait; when all have, the run is abandoned."""
        with self._lock:
            now_s = self._clock()
            left = [(caller, reason) for caller in self._callers if (reason := caller.gone(now_s)) is not None]
            if self._abandoned or len(left) == len(self._callers):
                self._abandoned = True
                return
            for caller, reason in left:
                self._callers.remove(caller)
                caller.answer.fail(reason)

    def _to_all(self, send: Callable[[Caller], None]) -> None:
        """One caller's broken connection does not concern the others."""
        with self._lock:
            for caller in list(self._callers):
                try:
                    send(caller)
                except Exception:  # whatever Triton raises for it; logged whole
                    _logger.exception("request %s: a caller could not be answered", self.request_id)
                    self._callers.remove(caller)


@dataclass(frozen=True)
class Kept:
    """A result: the `mark` of its request, and when it is too old."""

    outputs: Outputs
    mark: bytes
    size_bytes: int
    expires_s: float


class Results:
    """Runs under way and results kept, by REQUEST_ID. Any thread may call any method.

    ttl_s: how long a result is kept; max_bytes: all of them together; 0 keeps none. Runs are shared in any case.
    """

    def __init__(self, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s, self._max_bytes, self._clock = ttl_s, max_bytes, clock
        self._running: dict[str, SharedAnswer] = {}
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the oldest first
        self._size_bytes = 0
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Of all results that are kept."""
        return self._size_bytes

    def join(self, request_id: str, mark: bytes, answer: Answer, timeout_s: float | None) -> SharedAnswer | None:
        """The answer that a new run must give, with this caller attached; None when the caller is served already: by
        a run under way, or by a kept result. `mark` is the `fingerprint` of the inputs.

        Raises InvalidRequest when the id belongs to a request with other inputs, and QueueFull as `attach`.
        """
        with self._lock:
            self._drop_old()
            kept, running = self._kept.get(request_id), self._running.get(request_id)
            for known in (kept, running):
                if known is not None and known.mark != mark:
                    raise InvalidRequest(
                        f"REQUEST_ID {request_id!r} must come with the inputs that it came with before, got others: "
                        "choose a new id for a new request."
                    )
            if kept is None:
                accepted_s = self._clock()
                if running is not None and running.attach(Caller(answer, timeout_s, accepted_s, repeated=True)):
                    return None
                # The run keeps this caller's deadline itself.
                run = SharedAnswer(self._end, request_id, mark, self._clock)
                run.attach(Caller(answer, None, accepted_s, repeated=False))
                self._running[request_id] = run
                return run
        answer.finish(repeated(kept.outputs))
        return None

    def _end(self, run: SharedAnswer, outputs: Outputs | None) -> None:
        """Called once, at the end of a run; `outputs` is None after a failure."""
        with self._lock:
            if self._running.get(run.request_id) is not run:  # all had left, and one came back
                return
            del self._running[run.request_id]
            if outputs is None or self._ttl_s == 0:
                return
            size_bytes = _size_bytes(outputs)
            if size_bytes > self._max_bytes:
                return
            self._kept[run.request_id] = Kept(outputs, run.mark, size_bytes, self._clock() + self._ttl_s)
            self._size_bytes += size_bytes
            self._drop_old()

    def _drop_old(self) -> None:
        """The caller holds the lock. All live equally long, so the oldest is the first to expire."""
        while self._kept:
            request_id, oldest = next(iter(self._kept.items()))
            if self._size_bytes <= self._max_bytes and self._clock() < oldest.expires_s:
                return
            del self._kept[request_id]
            self._size_bytes -= oldest.size_bytes


def fingerprint(inputs: Mapping[str, NDArray[Any]]) -> bytes:
    """SHA-256 of all inputs but FREE_INPUTS."""
    digest = hashlib.sha256()
    for name in sorted(inputs.keys() - set(FREE_INPUTS)):
        array = inputs[name]
        parts = list(array.flat) if array.dtype == np.object_ else [np.ascontiguousarray(array).data]
        lengths = [len(part) for part in parts] if array.dtype == np.object_ else []
        digest.update(repr((name, array.dtype.str, array.shape, lengths)).encode())
        for part in parts:
            digest.update(part)
    return digest.digest()


def repeated(outputs: Outputs) -> Outputs:
    """A result with "repeated": true in its REPORT."""
    report = json.loads(outputs["REPORT"].flat[0])
    return {**outputs, "REPORT": np.array([json.dumps({**report, "repeated": True}).encode()], np.object_)}


def _size_bytes(outputs: Outputs) -> int:
    return sum(
        sum(len(value) for value in array.flat) if array.dtype == np.object_ else array.nbytes
        for array in outputs.values()
    )
