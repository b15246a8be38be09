"""Requests that are repeated: one run answers all that have the same REQUEST_ID, and its result is kept for a while.

A request is repeated by a client that lost its connection, or gave up too early. While its run is under way, the repeat
attaches to it: every caller gets the progress and the result; a caller that cancels leaves the others alone, and the
last one to leave ends the run, at once or, if a caller asked for that with KEEP_S, when so much time has passed without
another one. Afterwards, a repeat gets the kept result. Failures are not kept: a repeat runs again. Whoever knows the id
may end the run, and have the result forgotten, through `ti2v_cancel`.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import DeadlineExceeded, InvalidRequest, QueueFull, RequestCancelled
from stepvideo_serve.scheduling.kept_results import KeptResults
from stepvideo_serve.scheduling.request_signs import RequestSigns

Outputs = Mapping[str, NDArray[Any]]

# Inputs that a repeat may change: they decide how a caller waits for the result, not what the result is.
FREE_INPUTS = (
    *("REQUEST_ID", "REQUEST_PRIORITY", "TIMEOUT_S", "PREVIEW_EVERY", "PREVIEW_FORMAT"),
    *("MAX_RESPONSE_BYTES", "KEEP_S"),
)
MAX_CALLERS = 16  # callers that may wait for one run

_logger = logging.getLogger(__name__)


class Answer(Protocol):
    """Where the responses to one request go: `serving.adapter.Sender`, or a SharedAnswer in its place.

    The thread that computes calls `dismiss_gone` from time to time, then asks `cancelled`.
    """

    def send(self, outputs: Outputs) -> None: ...
    def finish(self, outputs: Outputs) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def cancelled(self) -> bool: ...
    def dismiss_gone(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Caller:
    """One caller of a run.

    timeout_s  from `accepted_s`; None: without a deadline
    repeated   the run had begun, or ended, before this caller came; REPORT then says so
    keep_s     how long the run goes on after all callers have left
    """

    answer: Answer
    timeout_s: float | None
    accepted_s: float
    repeated: bool
    keep_s: float = 0.0

    def gone(self, now_s: float) -> RequestCancelled | DeadlineExceeded | None:
        """Why the caller does not wait any more; None while it waits."""
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
        told_to_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self.request_id, self.mark = request_id, mark
        self.keep_s = 0.0
        """The longest `keep_s` of all callers."""
        self._keep, self._clock, self._told_to_end = keep, clock, told_to_end
        self._callers: list[Caller] = []
        self._latest: Outputs | None = None
        self._alone_since_s: float | None = None
        self._abandoned = self._cancelled_by_id = False
        self._lock = threading.RLock()

    def attach(self, caller: Caller) -> bool:
        """Adds a caller, who hears at once how far the run is; False where the run is about to end, wanted by nobody.

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
            self._alone_since_s, self.keep_s = None, max(self.keep_s, caller.keep_s)
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
        self._keep(self, outputs)  # before any caller has the result: a caller may then repeat the request
        again = repeated(outputs)
        self._to_all(lambda caller: caller.answer.finish(again if caller.repeated else outputs))

    def fail(self, error: BaseException) -> None:
        """Sends the error to all; callers who have left get the reason why they did."""
        if self._cancelled_by_id:
            error = RequestCancelled(f"The run of the REQUEST_ID {self.request_id!r} was cancelled by ti2v_cancel.")
        self._keep(self, None)
        self._to_all(lambda caller: caller.answer.fail(caller.gone(self._clock()) or error))

    def cancelled(self) -> bool:
        """Whether the run was wanted by nobody when `dismiss_gone` was called last: all callers had left for `keep_s`,
        or the id was cancelled."""
        return self._abandoned

    def dismiss_gone(self) -> None:
        """Answers the callers who have left, while the run goes on; abandons the run when nobody wants it any more."""
        with self._lock:
            self._cancelled_by_id = self._cancelled_by_id or self._told_to_end()
            now_s = self._clock()
            left = [(caller, reason) for caller in self._callers if (reason := caller.gone(now_s)) is not None]
            if self._abandoned or self._cancelled_by_id or self._nobody_comes(len(left), now_s):
                self._abandoned = True
                return
            for caller, reason in left:
                self._callers.remove(caller)
                caller.answer.fail(reason)

    def _nobody_comes(self, left: int, now_s: float) -> bool:
        """Whether all callers have left, and none has come since for `keep_s`."""
        if left < len(self._callers):
            return False
        if self._alone_since_s is None:
            self._alone_since_s = now_s
        return now_s - self._alone_since_s >= self.keep_s

    def _to_all(self, send: Callable[[Caller], None]) -> None:
        """Sends to each caller; a broken connection is logged and leaves the others alone."""
        with self._lock:
            for caller in list(self._callers):
                try:
                    send(caller)
                except Exception:  # whatever Triton raises for it; logged whole
                    _logger.exception("request %s: a caller could not be answered", self.request_id)
                    self._callers.remove(caller)


class Results:
    """Runs under way and results kept, by REQUEST_ID. Any thread may call any method. Runs are shared whether results
    are kept or not."""

    def __init__(
        self, kept: KeptResults, signs: RequestSigns | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.kept, self._clock = kept, clock
        self._signs = signs or RequestSigns(None, "")
        self._running: dict[str, SharedAnswer] = {}
        self._signed: set[str] = set()  # ids that have a sign: those with a run or a kept result
        self._lock = threading.Lock()

    def join(
        self, request_id: str, mark: bytes, answer: Answer, timeout_s: float | None, keep_s: float = 0.0
    ) -> SharedAnswer | None:
        """The answer that a new run must give, with this caller attached; None when the caller is served already: by
        a run under way, or by a kept result. `mark` is the `fingerprint` of the inputs.

        Raises InvalidRequest when the id belongs to a request with other inputs, and QueueFull as `attach`.
        """
        self.forget_cancelled()
        with self._lock:
            kept, running = self.kept.get(request_id), self._running.get(request_id)
            for known in (kept, running):
                if known is not None and known.mark != mark:
                    raise InvalidRequest(
                        f"REQUEST_ID {request_id!r} must come with the inputs that it came with before, got others: "
                        "choose a new id for a new request."
                    )
            if kept is None:
                caller = Caller(answer, timeout_s, self._clock(), repeated=True, keep_s=keep_s)
                if running is not None and running.attach(caller):
                    return None
                return self._begin(request_id, mark, caller)
        answer.finish(repeated(kept.outputs))
        return None

    def forget_cancelled(self) -> None:
        """Forgets the kept results whose ids were cancelled, and the signs of ids without a run or a result."""
        with self._lock:
            for request_id in self._signed - self._running.keys():
                if self._signs.take_cancelled(request_id):
                    self.kept.drop(request_id)
                self._forget(request_id)

    def _begin(self, request_id: str, mark: bytes, caller: Caller) -> SharedAnswer:
        """A new run. The deadline of its first caller is the run's own. The caller of this method holds the lock."""
        self._signs.forget(request_id)
        self._signs.know(request_id)
        self._signed.add(request_id)
        told_to_end = partial(self._signs.take_cancelled, request_id)
        run = SharedAnswer(self._end, request_id, mark, self._clock, told_to_end)
        run.attach(replace(caller, timeout_s=None, repeated=False))
        self._running[request_id] = run
        return run

    def _end(self, run: SharedAnswer, outputs: Outputs | None) -> None:
        """Called once, at the end of a run; `outputs` is None after a failure."""
        with self._lock:
            if self._running.get(run.request_id) is not run:  # abandoned, and a new run has its id
                return
        if outputs is not None:
            self.kept.put(run.request_id, run.mark, outputs, run.keep_s)
        with self._lock:
            if self._running.get(run.request_id) is run:
                del self._running[run.request_id]
                self._forget(run.request_id)

    def _forget(self, request_id: str) -> None:
        """Removes the sign of an id that has neither a run nor a result. The caller holds the lock."""
        if request_id not in self._running and self.kept.get(request_id) is None:
            self._signs.forget(request_id)
            self._signed.discard(request_id)


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
