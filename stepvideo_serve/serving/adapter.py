"""Between Triton's Python backend and the rest: arrays in, arrays out, every error one sentence with its code.

Loaded by Triton's stub processes only, where `triton_python_backend_utils` exists.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from stepvideo_serve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestError,
    ServiceUnavailable,
    SetupError,
    StepVideoError,
)

Arrays = Mapping[str, NDArray[Any]]


def read_inputs(request: Any) -> dict[str, NDArray[Any]]:
    """The request's tensors by name, as copies that outlive it."""
    return {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}


def is_probe(request: Any) -> bool:
    """Whether the request only asks if the model answers: it has a parameter `probe`, and its inputs say nothing."""
    return "probe" in json.loads(request.parameters() or "{}")


def response(outputs: Arrays) -> Any:
    """An InferenceResponse."""
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in outputs.items()]
    )


def error_response(error: BaseException) -> Any:
    """The response "CODE: sentence" with the closest status that Triton has."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(coded_sentence(error), _status(error)))


def coded_sentence(error: BaseException) -> str:
    """The text "CODE: sentence". What is not ours is INTERNAL, and logged whole."""
    if not isinstance(error, StepVideoError):
        log_traceback(error)
        error = StepVideoError(f"The server failed to answer the request: {type(error).__name__}; see its log.")
    return f"{error.code}: {error}"


def log_traceback(error: BaseException) -> None:
    """Writes the exception to the server's log."""
    import traceback

    pb_utils.Logger.log_error("".join(traceback.format_exception(error)))


def bytes_array(value: bytes) -> NDArray[np.object_]:
    """A BYTES tensor of shape [1]."""
    return np.array([value], dtype=np.object_)


@contextmanager
def clear_setup_errors() -> Iterator[None]:
    """In `initialize`: a SetupError or RequestError leaves as one sentence instead of a traceback."""
    try:
        yield
    except (SetupError, RequestError) as error:
        raise pb_utils.TritonModelException(str(error)) from None


def end_process() -> NoReturn:
    """The last act of `finalize`: ends the stub without taking the interpreter and torch apart, which needs seconds
    of CPU time in every process, more than a stopping server may have. The server has its answer and waits only for
    the process to end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Sender:
    """The responses of one decoupled request. Any thread may send; the first error or `close` is the last word."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._open = True

    def send(self, outputs: Arrays) -> None:
        """Sends one response; does nothing once closed."""
        with self._lock:
            if self._open:
                self._sender.send(response(outputs))

    def finish(self, outputs: Arrays) -> None:
        """Sends the last response, then the empty final one."""
        self._finish(response(outputs))

    def fail(self, error: BaseException) -> None:
        """Sends the error, then the empty final response."""
        self._finish(error_response(error))

    def close(self) -> None:
        """Sends the empty final response."""
        self._finish(None)

    def cancelled(self) -> bool:
        """Whether the caller has cancelled the request, or has gone."""
        return bool(self._sender.is_cancelled())

    def _finish(self, last: Any) -> None:
        with self._lock:
            if self._open:
                self._open = False
                try:
                    if last is not None:
                        self._sender.send(last)
                finally:  # without it the server would keep the request for good
                    self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class UnarySender(Sender):
    """The same for a model that is not decoupled: the one response, and no progress."""

    def send(self, outputs: Arrays) -> None:
        """Does nothing."""

    def _finish(self, last: Any) -> None:
        with self._lock:
            if self._open:
                self._open = False
                # In one piece: servers such as 24.10 crash when the end of an error comes by itself.
                self._sender.send(last, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _status(error: BaseException) -> Any:
    """Triton has no status for a full queue or a missed deadline: both become UNAVAILABLE; the text has the code."""
    codes = pb_utils.TritonError
    if isinstance(error, InvalidRequest):
        return codes.INVALID_ARG
    if isinstance(error, RequestCancelled):
        return codes.CANCELLED
    if isinstance(error, ServiceUnavailable | QueueFull | DeadlineExceeded):
        return codes.UNAVAILABLE
    return codes.INTERNAL
