"""What `dit_denoiser` and `vae_decoder` share: models that do one run at a time, on a thread of their own.

RUN_ID      begins a run and is answered with nothing; its inputs come along
NEXT_OF     fetches the next of the run's responses: outputs, ENDED, or its error; nothing, when there is none yet.
            Where a process died and was replaced its runs are gone, and the answer is an error
CANCEL_RUN  ends the run, waiting or under way, and is answered with nothing: servers before 25.04 cannot cancel one
            model's call of another

A run is ended when nothing was fetched for LEASE_S: its caller's process has died, and no server tells.

Responses are fetched, one request each, and not streamed: with a stream of responses (`exec(decoupled=True)`) the
caller's process can stand still for ever. Triton's Python backend then takes the interpreter's lock, the lock of its
table of streams and that of a stream in different orders (`Stub::GetResponseIterator`, `ResponseIterator::Next` and
`Stub::ProcessBLSResponseDecoupled`).
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import InvalidRequest, WorkerFailed
from stepvideo_serve.scheduling.run_queue import QueuedRun, RunQueue
from stepvideo_serve.serving.adapter import Arrays, UnarySender, end_process, read_inputs
from stepvideo_serve.serving.observe.traces import origin_of

HOLD_S = 0.25  # how long a fetch waits for something; each holds one of the server's 32 threads for the caller's calls
UNFETCHED_S = 120.0  # how long the end of a run waits for its caller
ENDED = "ENDED"

Outputs = dict[str, NDArray[Any]]

_logger = logging.getLogger(__name__)


class Reply(Protocol):
    """The one response to a fetch."""

    def finish(self, outputs: Outputs) -> None: ...
    def fail(self, error: BaseException) -> None: ...


class Mailbox:
    """What a run answers, in order: outputs, then an error or the output ENDED, which is the last.

    Any thread may call. A thread of its own replies: a reply to a caller whose process has died never returns.
    `gone()` is called, once started, when nothing will be replied any more.
    """

    def __init__(self, gone: Callable[[], None]) -> None:
        self._gone = gone
        self._letters: deque[Outputs | BaseException] = deque()
        self._fetches: deque[tuple[Reply, float]] = deque()  # with the time that each may wait until
        self._complete = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._deliver, name="mailbox", daemon=True)

    def start(self) -> None:
        """Once the run has been accepted: from now on there are replies."""
        self._thread.start()

    def send(self, outputs: Outputs) -> None:
        """Does nothing after the last."""
        self._put(outputs, last=False)

    def fail(self, error: BaseException) -> None:
        """The last."""
        self._put(error, last=True)

    def close(self) -> None:
        """The last, if there was no error."""
        self._put({ENDED: np.array([True])}, last=True)

    def fetch(self, reply: Reply) -> None:
        """Replies with the next of the run's answers, or with nothing after HOLD_S."""
        with self._changed:
            self._fetches.append((reply, time.monotonic() + HOLD_S))
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Until all has been fetched; at once if never started."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _put(self, letter: Outputs | BaseException, last: bool) -> None:
        with self._changed:
            if not self._complete:
                self._complete = last
                self._letters.append(letter)
                self._changed.notify()

    def _deliver(self) -> None:
        try:
            while (pair := self._next()) is not None:
                reply, letter = pair
                try:
                    if isinstance(letter, BaseException):
                        reply.fail(letter)
                    else:
                        reply.finish(letter)
                except Exception:  # the caller will ask why nothing came
                    _logger.exception("an answer could not be sent")
        finally:
            self._gone()

    def _next(self) -> tuple[Reply, Outputs | BaseException] | None:
        """Waits for a fetch and for something to reply; None after the last, or when nobody comes for it."""
        with self._changed:
            while True:
                if self._complete and not self._letters:
                    return None
                if self._fetches and self._letters:
                    return self._fetches.popleft()[0], self._letters.popleft()
                now_s = time.monotonic()
                if self._fetches and self._fetches[0][1] <= now_s:
                    return self._fetches.popleft()[0], {}
                wait_s = self._fetches[0][1] - now_s if self._fetches else UNFETCHED_S
                if not self._changed.wait(wait_s) and not self._fetches and self._complete:
                    return None


LEASE_S = 60.0
LAST_RESPONSES_S = 5.0  # how long a stopping model waits until its runs' callers know


class QueuedModel(ABC):
    """A subclass starts `self.queue` in `initialize`."""

    queue: RunQueue

    def __init__(self) -> None:
        self._mailboxes: dict[str, Mailbox] = {}
        self._lock = threading.Lock()  # guards it

    @abstractmethod
    def describe_run(self, inputs: Arrays) -> dict[str, Any]:
        """The run's parameters, from its inputs. Raises InvalidRequest. `timeout_s` is its deadline, if there."""

    def answer_at_once(self, inputs: Arrays) -> Arrays | None:  # noqa: ARG002  # for subclasses
        """The answer to a request that is not a run; None where it is one."""
        return None

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = UnarySender(request)
            try:
                self._take(request, sender)
            except Exception as error:  # every error becomes this request's response
                sender.fail(error)

    def finalize(self) -> None:
        self.queue.close()
        for mailbox in self._all_mailboxes():
            mailbox.join(LAST_RESPONSES_S)
        end_process()

    def _take(self, request: Any, sender: UnarySender) -> None:
        inputs = read_inputs(request)
        self.queue.end_abandoned(LEASE_S)  # in time: who would wait for them comes by here
        if "CANCEL_RUN" in inputs:
            self.queue.cancel(_identity(inputs, "CANCEL_RUN"))
            sender.finish({})
        elif "NEXT_OF" in inputs:
            self._fetch(_identity(inputs, "NEXT_OF"), sender)
        elif (answer := self.answer_at_once(inputs)) is not None:
            sender.finish(answer)
        else:
            self._begin(request, inputs)
            sender.finish({})

    def _begin(self, request: Any, inputs: Arrays) -> None:
        run_id, origin = _identity(inputs, "RUN_ID"), origin_of(request)
        params = self.describe_run(inputs)
        mailbox = self._new_mailbox(run_id)
        run = QueuedRun(run_id, params, dict(inputs), mailbox)
        run.request_id, run.traceparent = origin.request_id, origin.traceparent
        try:
            self.queue.put(run)
        except BaseException:
            self._forget(run_id)
            raise
        mailbox.start()

    def _fetch(self, run_id: str, sender: UnarySender) -> None:
        self.queue.renew(run_id)
        with self._lock:
            mailbox = self._mailboxes.get(run_id)
        if mailbox is None:
            raise WorkerFailed("The run must be known to this process, it is not: it has ended, or began in another.")
        mailbox.fetch(sender)

    def _new_mailbox(self, run_id: str) -> Mailbox:
        with self._lock:
            if run_id in self._mailboxes:
                raise InvalidRequest(f"RUN_ID must be new, got {run_id[:40]!r} of another run: choose another.")
            self._mailboxes[run_id] = mailbox = Mailbox(partial(self._forget, run_id))
            return mailbox

    def _forget(self, run_id: str) -> None:
        with self._lock:
            self._mailboxes.pop(run_id, None)

    def _all_mailboxes(self) -> list[Mailbox]:
        with self._lock:
            return list(self._mailboxes.values())


def _identity(inputs: Arrays, name: str) -> str:
    if name not in inputs:
        raise InvalidRequest(f"A run needs {name}, got none: call the model ti2v instead.")
    return str(inputs[name].flat[0].decode(errors="backslashreplace"))
