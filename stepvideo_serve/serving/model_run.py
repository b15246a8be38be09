"""Calls of the server's other models that end even where the process of that model does not.

A process that is killed leaves whoever waits for its responses waiting for ever: a run is therefore read on a thread of
its own, and asked after while it says nothing.
"""

import contextlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from stepvideo_serve.errors import RequestError, WorkerFailed
from stepvideo_serve.serving.adapter import Arrays, bytes_array
from stepvideo_serve.serving.telemetry import UNKNOWN, Origin

CANCEL_POLL_S = 0.05
CANCEL_AGAIN_S = 1.0
ASK_AFTER_S = 5.0  # how long a run may say nothing before its process is asked whether it has it
SHOW_EVERY_S = 10.0  # how often the run's process hears that its caller is there
DOUBTS = 2  # answers "no" in a row, with nothing in between, until the run is given up: it may just have ended
ANSWER_S = 60.0  # how long a process may take to answer
KEEP_S = 5.0  # see _responses; the clean-up takes milliseconds

Outputs = dict[str, np.ndarray[Any, Any]]
T = TypeVar("T")


def call(model: str, inputs: Arrays, outputs: tuple[str, ...], origin: Origin = UNKNOWN) -> Outputs:
    """One request, one response. Raises the RequestError that the model answered with."""
    return _read(_request(model, inputs, outputs, origin).exec())


def ask(model: str, inputs: Arrays) -> Outputs:
    """A question that a decoupled model answers at once. Raises the RequestError that it answered with."""
    answer: Outputs = {}
    for response in list(_responses(_request(model, inputs, ()))):  # all are taken, also when one is an error
        answer |= _read(response)
    return answer


def run(
    model: str, inputs: Arrays, cancelled: Callable[[], bool], origin: Origin = UNKNOWN
) -> Generator[Outputs, None, None]:
    """One run of a decoupled model, its responses in turn. Raises the RequestError that the model answered with, and
    WorkerFailed when its process has died or does not answer.

    `cancelled()` ends the run, and so does closing the generator early. Either way every response is taken: one that
    is left stays in the server for good, which then cannot unload the calling model.
    """
    run_id = bytes_array(uuid.uuid4().hex.encode())
    reader = _Reader(model, {**inputs, "RUN_ID": run_id}, origin)
    try:
        with _cancelling(model, run_id, cancelled):
            yield from reader.responses(run_id)
    finally:
        with contextlib.suppress(RequestError):
            for _ in reader.responses(run_id):
                continue


class _Reader:
    """The responses of one run, taken on a thread of its own, which is left behind when the run's process has died."""

    def __init__(self, model: str, inputs: Arrays, origin: Origin) -> None:
        self._model = model
        self._inbox: queue.SimpleQueue[Outputs | Exception | None] = queue.SimpleQueue()
        self._ended = False
        threading.Thread(target=self._take, args=(inputs, origin), name="run-reader", daemon=True).start()

    def responses(self, run_id: np.ndarray[Any, Any]) -> Iterator[Outputs]:
        """Those that were not taken yet; none once the run has ended or was given up."""
        doubts = 0
        while not self._ended:
            try:
                message = self._inbox.get(timeout=ASK_AFTER_S)
            except queue.Empty:
                doubts = self._ask_after(run_id, doubts)
                continue
            doubts = 0
            if message is None:
                self._ended = True
            elif isinstance(message, Exception):
                raise message
            else:
                yield message

    def _take(self, inputs: Arrays, origin: Origin) -> None:
        try:
            for response in _responses(_request(self._model, inputs, (), origin)):
                try:
                    if outputs := _read(response):
                        self._inbox.put(outputs)
                except RequestError as error:
                    self._inbox.put(error)
        except Exception as error:  # belongs to whoever reads
            self._inbox.put(error)
        self._inbox.put(None)

    def _ask_after(self, run_id: np.ndarray[Any, Any], doubts: int) -> int:
        """How many doubts there are now. Raises WorkerFailed when there are too many."""
        try:
            in_time(lambda: ask(self._model, {"ASK_RUN": run_id}))
        except TimeoutError:
            reason = f"gave no answer for {ANSWER_S:g} s"
        except RequestError as error:
            if doubts + 1 < DOUBTS:
                return doubts + 1
            reason = f"is not the one that began the run, or is gone ({error})"
        else:
            return 0
        self._ended = True
        raise WorkerFailed(f"The process of {self._model} was lost during the request, it {reason}: send it again.")


@contextlib.contextmanager
def _cancelling(model: str, run_id: np.ndarray[Any, Any], cancelled: Callable[[], bool]) -> Iterator[None]:
    """While the block runs, a cancel of the public request becomes one of the model's run; leaving the block by an
    exception ends the run too."""
    left = threading.Event()

    def cancel_run() -> None:
        with contextlib.suppress(TimeoutError, RequestError):  # a process that is gone runs nothing
            in_time(lambda: ask(model, {"CANCEL_RUN": run_id}))

    def watch() -> None:
        pause_s, shown_s = CANCEL_POLL_S, time.monotonic()
        while not left.wait(pause_s):
            if cancelled():
                cancel_run()
                pause_s = CANCEL_AGAIN_S  # in case it was there before the run
            elif time.monotonic() - shown_s > SHOW_EVERY_S:
                with contextlib.suppress(TimeoutError, RequestError):  # for the reader to find out
                    in_time(lambda: ask(model, {"ASK_RUN": run_id}))
                shown_s = time.monotonic()

    watcher = threading.Thread(target=watch, name="cancel-watch")
    watcher.start()
    try:
        yield
    except BaseException:
        cancel_run()
        raise
    finally:
        left.set()
        watcher.join()


def in_time(function: Callable[[], T], limit_s: float = ANSWER_S) -> T:
    """The function's result, or its exception; TimeoutError after limit_s, when its thread is left behind."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # raised where the result is waited for
            future.set_exception(error)

    threading.Thread(target=work, name="question", daemon=True).start()
    return future.result(limit_s)


def _request(model: str, inputs: Arrays, outputs: tuple[str, ...], origin: Origin = UNKNOWN) -> Any:
    return pb_utils.InferenceRequest(
        model_name=model,
        request_id=origin.request_id,
        parameters=origin.parameters,
        requested_output_names=list(outputs),
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
    )


def _responses(request: Any) -> Iterator[Any]:
    """The responses of a decoupled model; waits for the first one.

    What Triton gives for them is kept for a while after the last. Its clean-up thread forgets a finished call under the
    lock of the table of calls; if nobody else holds that call, it frees it there, for which it needs the interpreter's
    lock. `exec` takes the two the other way round when it returns, and the process would stand still for ever
    (`Stub::SendCleanupId` and `Stub::GetResponseIterator` in pb_stub.cc of the Python backend).
    """
    responses = request.exec(decoupled=True)
    try:
        yield from responses
    finally:
        kept = threading.Timer(KEEP_S, lambda _: None, (responses,))
        kept.daemon = True
        kept.start()


def _read(response: Any) -> Outputs:
    if response.has_error():
        raise error_from_text(response.error().message())
    outputs = {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}
    if "ERROR" in outputs:
        raise error_from_text(outputs["ERROR"].flat[0].decode())
    return outputs


def error_from_text(message: str) -> RequestError:
    """The RequestError of a "CODE: sentence"; anything else was not sent by our models and is INTERNAL."""
    code, _, sentence = message.partition(": ")
    for kind in RequestError.__subclasses__():
        if kind.code == code:
            return kind(sentence)
    return WorkerFailed(f"A model of this server failed: {message.splitlines()[0] if message else 'no message'}")
