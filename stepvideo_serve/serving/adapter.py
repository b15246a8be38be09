"""Between Triton's Python backend and the rest: arrays in, arrays out, every error one sentence with its code.

Loaded by Triton's stub processes only, where `triton_python_backend_utils` exists.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from stepvideo_serve.errors import (
    DeadlineExceeded,
    DeviceLost,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestError,
    ServiceUnavailable,
    SetupError,
    StepVideoError,
)
from stepvideo_serve.request.response_size import response_bytes, too_large
from stepvideo_serve.request.rules import shortened
from stepvideo_serve.scheduling.run_queue import Waiting

Arrays = Mapping[str, NDArray[Any]]


def read_inputs(request: Any) -> dict[str, NDArray[Any]]:
    """The request's tensors by name, as copies that outlive it."""
    return {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}


def parameters_of(request: Any) -> dict[str, Any]:
    """The request's parameters; empty where the caller sent something else than a JSON object."""
    try:
        parameters = json.loads(request.parameters() or "{}")
    except ValueError:  # no UTF-8, or no JSON
        return {}
    return parameters if isinstance(parameters, dict) else {}


def is_probe(request: Any) -> bool:
    """Whether the request only asks if the model answers: its parameter `probe` is true, and its inputs say nothing.

    Raises InvalidRequest for a `probe` that is neither true nor false.
    """
    value = parameters_of(request).get("probe", False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"The parameter probe must be true or false, got {shortened(value)}: correct it.")
    return value


def own_timeout_s(request: Any) -> float | None:
    """Triton's request parameter `timeout`, which comes in microseconds; None without one.

    Triton passes the parameter to the model and does nothing about the time. It does not pass `priority`.
    """
    timeout_us: int = request.timeout()
    return timeout_us / 1e6 if timeout_us > 0 else None


def response(outputs: Arrays) -> Any:
    """An InferenceResponse."""
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in outputs.items()]
    )


def error_response(error: BaseException) -> Any:
    """The response "CODE: sentence" with the closest status that Triton has."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(coded_sentence(error), _status(error)))


def coded_sentence(error: BaseException) -> str:
    """The text "CODE: sentence". An exception that is no StepVideoError is logged whole and becomes INTERNAL."""
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


def end_process(status: int = 0) -> NoReturn:
    """The last act of `finalize`: ends the stub without taking the interpreter and torch apart, which needs seconds
    of CPU time in every process, more than a stopping server may have. The server has its answer and waits only for
    the process to end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def waiting_outputs(waiting: Waiting) -> dict[str, NDArray[Any]]:
    """QUEUE_POSITION and, if the start is known, START_IN_S."""
    outputs: dict[str, NDArray[Any]] = {"QUEUE_POSITION": np.array([waiting.position], np.int32)}
    if waiting.start_in_s is not None:
        outputs["START_IN_S"] = np.array([waiting.start_in_s], np.float32)
    return outputs


class Sender:
    """The responses of one request. Any thread may send; nothing is sent after the first error or result.

    decoupled   the model streams: progress is sent too. Otherwise the result or the error is the only response
    ended       called with the error, or None for a result, before that is sent
    most_bytes  of the result's response; a larger result becomes an error. None: no bound
    """

    most_bytes: int | None = None

    def __init__(
        self, request: Any, decoupled: bool, ended: Callable[[BaseException | None], None] = lambda _: None
    ) -> None:
        self._sender = request.get_response_sender()
        self._decoupled, self._ended = decoupled, ended
        self._lock = threading.Lock()
        self._open = True

    def send(self, outputs: Arrays) -> None:
        """Sends progress, where the model streams; does nothing after an error or a result."""
        with self._lock:
            if self._open and self._decoupled:
                self._sender.send(response(outputs))

    def finish(self, outputs: Arrays) -> None:
        """Sends the result; in its place an error, where the result has more than `most_bytes`."""
        if self.most_bytes is not None and (size := response_bytes(outputs)) > self.most_bytes:
            self.fail(too_large(self.most_bytes, size))
            return
        self._ended(None)
        self._finish(response(outputs))

    def waiting(self, waiting: Waiting) -> None:
        """Sends the place of a run that waits, as the one response to a fetch."""
        self.finish(waiting_outputs(waiting))

    def fail(self, error: BaseException) -> None:
        """Sends the error. A process that has lost its GPU then exits, and the supervisor has the model loaded anew."""
        self._ended(error)
        if isinstance(error, DeviceLost):
            log_traceback(error)
        self._finish(error_response(error))
        if isinstance(error, DeviceLost):
            end_process(error.exit_status)

    def cancelled(self) -> bool:
        """Whether the caller has cancelled the request, or has gone."""
        return bool(self._sender.is_cancelled())

    def dismiss_gone(self) -> None:
        """Does nothing: a Sender has one caller, who is answered when the run ends. See scheduling/idempotency.py."""

    def _finish(self, last: Any) -> None:
        with self._lock:
            if not self._open:
                return
            self._open = False
            if not self._decoupled:
                # In one piece: servers such as 24.10 crash when the end of an error comes by itself.
                self._sender.send(last, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                return
            try:
                self._sender.send(last)
            finally:  # without it the server would keep the request for good
                self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


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
