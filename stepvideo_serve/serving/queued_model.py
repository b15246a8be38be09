"""What `dit_denoiser` and `vae_decoder` share: models that do one run at a time, on a thread of their own.

RUN_ID      begins a run and is answered with nothing; its inputs come along
NEXT_OF     fetches the next of the run's responses: outputs, ENDED, or its error; nothing, when there is none yet.
            Where a process died and was replaced its runs are gone, and the answer is an error
CANCEL_RUN  ends the run, waiting or under way, and is answered with nothing: servers before 25.04 cannot cancel one
            model's call of another

Only models of this server may ask any of this (launch/boundary.py). Anybody may send a probe, which is answered with
`probed()` and changes nothing.

A run is ended when nothing was fetched for LEASE_S: its caller's process has died, and no server tells.

Responses are fetched, one request each, and not streamed: with a stream of responses (`exec(decoupled=True)`) the
caller's process can stand still for ever. Triton's Python backend then takes the interpreter's lock, the lock of its
table of streams and that of a stream in different orders (`Stub::GetResponseIterator`, `ResponseIterator::Next` and
`Stub::ProcessBLSResponseDecoupled`).
"""

import threading
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import InvalidRequest, QueueFull, WorkerFailed
from stepvideo_serve.launch.boundary import Boundary
from stepvideo_serve.scheduling.run_queue import QueuedRun, RunQueue, RunTerms
from stepvideo_serve.serving.adapter import Arrays, Sender, end_process, is_probe, parameters_of, read_inputs
from stepvideo_serve.serving.mailbox import Backlog, Mailbox
from stepvideo_serve.serving.observe.thread_deaths import ThreadDeaths
from stepvideo_serve.serving.observe.traces import origin_of
from stepvideo_serve.serving.stage_bounds import MAX_RUN_ID_BYTES, StageBounds, TensorBounds

LEASE_S = 60.0
LAST_RESPONSES_S = 5.0  # how long a stopping model waits until its runs' callers know


class QueuedModel(ABC):
    """A subclass calls `prepare` and starts `self.queue` in `initialize`."""

    queue: RunQueue

    def __init__(self) -> None:
        self._mailboxes: dict[str, Mailbox] = {}
        self._lock = threading.Lock()  # guards _mailboxes

    def prepare(self, model: str, config: ServeConfig) -> None:
        """Raises SetupError where the launcher gave no token, or the checkpoint does not say what its tensors are."""
        self._name, self._boundary = model, Boundary.from_environment()
        self._deaths, self.bounds = ThreadDeaths.watched(), StageBounds.of(config)
        self.tensor_bounds = TensorBounds.of(config.model.dir)
        self._backlog = Backlog(self.bounds.max_unfetched_bytes)

    def is_ready(self) -> bool:
        """Asked by servers from 26.03 on: not once a thread has died."""
        return self._deaths.none

    def probed(self) -> Arrays:
        """The answer to a probe: to be had by anybody, without reading an input or changing anything."""
        return {}

    @abstractmethod
    def describe_run(self, inputs: Arrays) -> RunTerms:
        """What the run is, from its inputs. Raises InvalidRequest."""

    def answer_at_once(self, inputs: Arrays) -> Arrays | None:  # noqa: ARG002  # for subclasses
        """The answer to a request that is not a run; None where it is one."""
        return None

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = Sender(request, decoupled=False)
            try:
                self._take(request, sender)
            except Exception as error:  # every error becomes this request's response
                sender.fail(error)

    def finalize(self) -> None:
        self.queue.close()
        for mailbox in self._all_mailboxes():
            mailbox.join(LAST_RESPONSES_S)
        end_process()

    def _take(self, request: Any, sender: Sender) -> None:
        if is_probe(request):
            self._deaths.check(self._name)
            sender.finish(self.probed())
            return
        self._boundary.check(self._name, parameters_of(request))
        inputs = read_inputs(request)
        self.queue.end_abandoned(LEASE_S)  # at every call: no run then waits behind one whose caller has died
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
        terms = self.describe_run(inputs)
        mailbox = self._new_mailbox(run_id)
        try:
            self.queue.put(QueuedRun(run_id, terms, mailbox, origin.request_id, origin.traceparent))
        except BaseException:
            self._forget(run_id)
            raise
        mailbox.start()

    def _fetch(self, run_id: str, sender: Sender) -> None:
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
            most = self.bounds.max_runs
            if len(self._mailboxes) >= most:
                raise QueueFull(f"At most {most} runs may be known to {self._name}, {most} are: try again later.")
            self._mailboxes[run_id] = mailbox = Mailbox(partial(self._forget, run_id), self._backlog)
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
    if len(inputs[name].flat[0]) > MAX_RUN_ID_BYTES:
        found = len(inputs[name].flat[0])
        raise InvalidRequest(f"{name} must be at most {MAX_RUN_ID_BYTES} bytes, got {found}: shorten it.")
    return str(inputs[name].flat[0].decode(errors="backslashreplace"))
