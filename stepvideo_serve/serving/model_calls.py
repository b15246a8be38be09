"""Calls of the server's other models that end even where the process of that model does not.

A process that is killed leaves whoever waits for its response waiting for ever: a run's responses are therefore fetched
on a thread of its own, and the process is asked whether it lives when a fetch is not answered.
"""

import contextlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, wait
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from stepvideo_serve.errors import RequestCancelled, RequestError, ServiceUnavailable, WorkerFailed
from stepvideo_serve.launch.boundary import Boundary
from stepvideo_serve.launch.stopping import shutting_down
from stepvideo_serve.serving.adapter import Arrays, bytes_array
from stepvideo_serve.serving.mailbox import ENDED
from stepvideo_serve.serving.observe.traces import UNKNOWN, Origin
from stepvideo_serve.serving.stage_work import CALL_ID, CANCEL_CALL

CANCEL_POLL_S = 0.05
CANCEL_AGAIN_S = 1.0
SILENCE_S = 5.0  # how long a fetch may take before the run's process is asked whether it lives
DOUBTS = 2  # a run is given up after so many checks in a row in which its process answers, but the fetch does not
ANSWER_S = 60.0  # how long a process may take to answer
SERVER_IS_ENDING = ("Server not ready", "Server is stopping")  # Triton's words for any call from then on

Outputs = dict[str, np.ndarray[Any, Any]]
T = TypeVar("T")


def call(model: str, inputs: Arrays, outputs: tuple[str, ...], origin: Origin = UNKNOWN) -> Outputs:
    """One request, one response. Raises the RequestError that the model answered with."""
    return _read(_request(model, inputs, outputs, origin).exec())


def call_until(
    model: str, inputs: Arrays, outputs: tuple[str, ...], cancelled: Callable[[], bool], origin: Origin = UNKNOWN
) -> Outputs:
    """Like `call`, of a model that answers on a thread of its own (stage_work.py): raises RequestCancelled, and has the
    model give the call up, once `cancelled()`."""
    call_id = uuid.uuid4().hex
    answer = _begun(lambda: _read(_request(model, inputs, outputs, origin, {CALL_ID: call_id}).exec()))
    while not wait([answer], CANCEL_POLL_S).done:
        if cancelled():
            with contextlib.suppress(TimeoutError, RequestError):  # a process that is gone answers nothing
                in_time(lambda: _read(_request(model, inputs, (), origin, {CANCEL_CALL: call_id}).exec()))
            raise RequestCancelled("The request was cancelled by its caller.")
    return answer.result()


def run(
    model: str, inputs: Arrays, cancelled: Callable[[], bool], origin: Origin = UNKNOWN
) -> Generator[Outputs, None, None]:
    """One run of a model that queues runs (queued_model.py): the run's responses in turn.

    Raises the RequestError that the model answered with, and WorkerFailed when its process has died or does not answer.

    `cancelled()` ends the run, and so does closing the generator early.
    """
    run_id = bytes_array(uuid.uuid4().hex.encode())
    reader = _Reader(model, {**inputs, "RUN_ID": run_id}, origin)
    try:
        with _cancelling(model, run_id, cancelled):
            yield from reader.responses()
    finally:
        with contextlib.suppress(RequestError):
            for _ in reader.responses():
                continue


class _Reader:
    """The responses of one run, fetched on a thread of its own, which is left behind when the process has died."""

    def __init__(self, model: str, inputs: Arrays, origin: Origin) -> None:
        self._model, self._run_id = model, inputs["RUN_ID"]
        self._inbox: queue.SimpleQueue[Outputs | Exception | None] = queue.SimpleQueue()
        self._heard_s = time.monotonic()
        self._ended = False
        threading.Thread(target=self._take, args=(inputs, origin), name="run-reader", daemon=True).start()

    def responses(self) -> Iterator[Outputs]:
        """Those that were not taken yet; none once the run has ended or was given up."""
        doubts = 0
        while not self._ended:
            try:
                message = self._inbox.get(timeout=SILENCE_S)
            except queue.Empty:
                silent = time.monotonic() - self._heard_s > SILENCE_S
                doubts = doubts + 1 if silent else 0
                if silent:
                    self._ask(doubts)
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
            call(self._model, inputs, (), origin)
            while ENDED not in (outputs := call(self._model, {"NEXT_OF": self._run_id}, ())):
                self._heard_s = time.monotonic()
                if outputs:
                    self._inbox.put(outputs)
        except Exception as error:  # raised by `responses`
            self._inbox.put(error)
        self._inbox.put(None)

    def _ask(self, doubts: int) -> None:
        """Raises WorkerFailed when the process is dead, or another one than the run began in."""
        try:
            in_time(lambda: call(self._model, {"CANCEL_RUN": bytes_array(b"nobody")}, ()))
        except TimeoutError:
            reason = f"gave no answer for {ANSWER_S:g} s"
        except ServiceUnavailable:
            self._ended = True
            raise
        except RequestError as error:
            reason = f"is gone ({error})"
        else:
            if doubts < DOUBTS:
                return
            reason = "is not the one that began the run"
        self._ended = True
        raise WorkerFailed(f"The process of {self._model} was lost during the request, it {reason}: send it again.")


@contextlib.contextmanager
def _cancelling(model: str, run_id: np.ndarray[Any, Any], cancelled: Callable[[], bool]) -> Iterator[None]:
    """While the block runs, a cancel of the public request becomes one of the model's run; leaving the block by an
    exception ends the run too. A watch that fails ends the run, which then fails with WorkerFailed."""
    left = threading.Event()
    failures: list[BaseException] = []

    def cancel_run() -> None:
        with contextlib.suppress(TimeoutError, RequestError):  # a process that is gone runs nothing
            in_time(lambda: call(model, {"CANCEL_RUN": run_id}, ()))

    def watch() -> None:
        pause_s = CANCEL_POLL_S
        try:
            while not left.wait(pause_s):
                if cancelled():
                    cancel_run()
                    pause_s = CANCEL_AGAIN_S  # the run may have begun after the cancel
        except BaseException as error:
            failures.append(error)
            cancel_run()
            raise  # ThreadDeaths hears of the exception

    watcher = threading.Thread(target=watch, name="cancel-watch")
    watcher.start()
    try:
        yield
    except BaseException as error:
        cancel_run()
        if failures and isinstance(error, RequestCancelled):
            reason = type(failures[0]).__name__
            raise WorkerFailed(f"The watch over a cancel has failed ({reason}): see the server's log.") from error
        raise
    finally:
        left.set()
        watcher.join()


def in_time(function: Callable[[], T], limit_s: float = ANSWER_S) -> T:
    """The function's result, or its exception; TimeoutError after limit_s, when its thread is left behind."""
    return _begun(function).result(limit_s)


def _begun(function: Callable[[], T]) -> "Future[T]":
    """The function's result to come, on a thread of its own."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # raised where the result is waited for
            future.set_exception(error)

    threading.Thread(target=work, name="question", daemon=True).start()
    return future


def _request(
    model: str,
    inputs: Arrays,
    outputs: tuple[str, ...],
    origin: Origin = UNKNOWN,
    parameters: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    return pb_utils.InferenceRequest(
        model_name=model,
        request_id=origin.request_id,
        parameters={**origin.parameters, **parameters, **Boundary.from_environment().parameters},
        requested_output_names=list(outputs),
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
    )


def _read(response: Any) -> Outputs:
    if response.has_error():
        raise error_from_text(response.error().message())
    return {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}


def error_from_text(message: str) -> RequestError:
    """The RequestError of a "CODE: sentence". Anything else was not sent by our models: ServiceUnavailable where the
    server is ending, else WorkerFailed."""
    code, _, sentence = message.partition(": ")
    for kind in RequestError.__subclasses__():
        if kind.code == code:
            return kind(sentence)
    if any(words in message for words in SERVER_IS_ENDING):
        return shutting_down()
    return WorkerFailed(f"A model of this server failed: {message.splitlines()[0] if message else 'no message'}")
