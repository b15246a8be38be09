"""One request as it is on the wire, and everything that came back, counted."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

Values = Mapping[str, NDArray[Any] | bytes]
Leave = Literal["cancel", "close"]

OK = "OK"
CANCELLED = "CANCELLED"
REFUSED_BY_TRITON = "REFUSED_BY_TRITON"
STUCK = "STUCK"
# gRPC shares connections between channels to one server: closing one would close nothing.
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
CODES = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", CANCELLED, "INTERNAL")


@dataclass(frozen=True)
class Outcome:
    """How a request ended.

    code      OK, one of CODES, CANCELLED (also when the caller left), REFUSED_BY_TRITON (in Triton's own words), or
              STUCK: nothing final within the time limit
    text      the error's sentence, else ""
    ends      results and errors that came; exactly 1, and 0 only when the caller left
    latents   bytes of LATENTS, fp32, of a result
    report    REPORT of a result
    """

    code: str
    text: str
    ends: int
    latents: bytes | None = None
    report: Mapping[str, Any] | None = None
    seconds: float = 0.0


def message(model: str, values: Values) -> Any:
    """The ModelInferRequest; a `bytes` value is a BYTES tensor of shape [1]."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, value in values.items():
        array = np.array([value], np.object_) if isinstance(value, bytes) else value
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        raw = serialize_byte_tensor(array).item() if array.dtype == np.object_ else array.tobytes()
        request.raw_input_contents.append(raw)
    return request


def exchange(
    url: str, values: Values, limit_s: float, leave_after_s: float | None = None, leave: Leave = "cancel"
) -> Outcome:
    """Sends to `ti2v` on a stream and channel of its own, and reads until the server has ended the stream.

    After `leave_after_s` the caller cancels, or closes its connection without a word.
    """
    began_s = time.monotonic()
    done = threading.Event()
    request = message("ti2v", values)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    left = threading.Event()

    def outgoing() -> Iterator[Any]:
        yield request
        done.wait()  # a stream is answered while the client's side is open

    with grpc.insecure_channel(url, options=OWN_CONNECTION) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(outgoing(), timeout=limit_s)

        def go() -> None:
            left.set()
            if leave == "cancel":
                call.cancel()
            else:
                channel.close()

        timer = threading.Timer(leave_after_s or 0.0, go)
        if leave_after_s is not None:
            timer.start()
        try:
            return _read(call, done, left, began_s)
        finally:
            timer.cancel()
            done.set()


def _read(call: Any, done: threading.Event, left: threading.Event, began_s: float) -> Outcome:
    results: list[InferResult] = []
    errors: list[str] = []
    try:
        for answer in call:
            if answer.error_message:
                errors.append(answer.error_message)
                if code_of(answer.error_message) == REFUSED_BY_TRITON:  # it sends no final response
                    done.set()
                continue
            response = answer.infer_response
            if any(output.name == "REPORT" for output in response.outputs):
                results.append(InferResult(response))
            if response.parameters["triton_final_response"].bool_param:
                done.set()
    except grpc.RpcError as error:
        if not (results or errors):
            return _without_answer(error, left, began_s)
    except ValueError:  # a closed channel's call
        if not (results or errors):
            return Outcome(CANCELLED, "", 0, seconds=time.monotonic() - began_s)
    seconds = time.monotonic() - began_s
    ends = len(results) + len(errors)
    if errors:
        return Outcome(code_of(errors[0]), errors[0], ends, seconds=seconds)
    if not results:
        return Outcome(STUCK, "the stream ended without a result or an error", 0, seconds=seconds)
    return _result(results[0], ends, seconds)


def exchange_unary(url: str, values: Values, limit_s: float) -> Outcome:
    """The same to `ti2v_unary`; no early leaving."""
    began_s = time.monotonic()
    with grpc.insecure_channel(url, options=OWN_CONNECTION) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            response = stub.ModelInfer(message("ti2v_unary", values), timeout=limit_s)
        except grpc.RpcError as error:
            return _without_answer(error, threading.Event(), began_s)
    return _result(InferResult(response), 1, time.monotonic() - began_s)


def outcome_of(channel: grpc.Channel, request: Any, limit_s: float, leave_after_s: float | None = None) -> Outcome:
    """How a unary request to any model ends, whatever it answers; the caller cancels after `leave_after_s`."""
    began_s = time.monotonic()
    call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(request, timeout=limit_s)
    left = threading.Event()
    try:
        if leave_after_s is not None:
            with contextlib.suppress(grpc.FutureTimeoutError):
                call.exception(leave_after_s)
            if not call.done():
                left.set()
                call.cancel()
        call.result()
    except grpc.RpcError as error:
        return _without_answer(error, left, began_s)
    except grpc.FutureCancelledError:
        return Outcome(CANCELLED, "", 0, seconds=time.monotonic() - began_s)
    return Outcome(OK, "", 1, seconds=time.monotonic() - began_s)


def _result(result: InferResult, ends: int, seconds: float) -> Outcome:
    report = json.loads(result.as_numpy("REPORT")[0])
    return Outcome(OK, "", ends, result.as_numpy("LATENTS").tobytes(), report, seconds)


def _without_answer(error: Any, left: threading.Event, began_s: float) -> Outcome:
    """What the transport said in place of an answer."""
    seconds = time.monotonic() - began_s
    if left.is_set():
        return Outcome(CANCELLED, "", 0, seconds=seconds)
    text = error.details() or ""
    code = code_of(text)
    if code == REFUSED_BY_TRITON and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Outcome(STUCK, text, 0, seconds=seconds)
    if code == REFUSED_BY_TRITON and error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
        return Outcome(error.code().name, text, 1, seconds=seconds)
    return Outcome(code, text, 1, seconds=seconds)


def code_of(text: str) -> str:
    """The code in front of an error's sentence."""
    code = text.partition(": ")[0]
    return code if code in CODES else REFUSED_BY_TRITON
