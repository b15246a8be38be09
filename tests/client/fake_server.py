"""A gRPC server that speaks the public interface of `ti2v` and `ti2v_unary` from a script, without a model."""

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

JPEG = b"\xff\xd8 preview \xff\xd9"
MP4 = b"\x00\x00\x00\x18ftypisom" + bytes(range(256))
REPORT = {"seed": 7, "seconds": {"total": 1.5}, "step_seconds": [0.5, 0.5], "layout": "cfg1.tp1.sp1"}

# What the server does next with a stream; a response to send, or something to do that may send nothing.
Action = Callable[["FakeServer", Any], Any]


def outputs(**tensors: Any) -> Any:
    """A ModelInferResponse; values are numpy arrays, or bytes for a BYTES tensor of one element."""
    response = service_pb2.ModelInferResponse(model_name="ti2v")
    datatypes = {"int32": "INT32", "int64": "INT64", "float32": "FP32", "uint8": "UINT8"}
    for name, value in tensors.items():
        if isinstance(value, bytes):
            response.outputs.add(name=name, datatype="BYTES", shape=[1])
            response.raw_output_contents.append(struct.pack("<I", len(value)) + value)
        else:
            response.outputs.add(name=name, datatype=datatypes[value.dtype.name], shape=value.shape)
            response.raw_output_contents.append(value.tobytes())
    return response


def step(number: int, total: int, elapsed_s: float = 0.0, **more: Any) -> Action:
    """A progress response."""
    progress = {
        "STEP": np.array([number], np.int32),
        "TOTAL_STEPS": np.array([total], np.int32),
        "ELAPSED_S": np.array([elapsed_s], np.float32),
    }
    return respond(**progress, **more)


def result(**tensors: Any) -> Action:
    """The result response: VIDEO unless `tensors` says otherwise."""
    return respond(**result_tensors(**tensors))


def result_tensors(**tensors: Any) -> dict[str, Any]:
    """The tensors of a result response."""
    return {**(tensors or {"VIDEO": MP4}), "SEED": np.array([7], np.int64), "REPORT": json.dumps(REPORT).encode()}


def respond(**tensors: Any) -> Action:
    """A response with these tensors."""
    return lambda _server, _context: service_pb2.ModelStreamInferResponse(infer_response=outputs(**tensors))


def final() -> Action:
    """The empty response that ends a decoupled request."""

    def act(_server: "FakeServer", _context: Any) -> Any:
        response = service_pb2.ModelStreamInferResponse()
        response.infer_response.parameters["triton_final_response"].bool_param = True
        return response

    return act


def error(message: str) -> Action:
    """An error of the request: on a stream only its text travels."""
    return lambda _server, _context: service_pb2.ModelStreamInferResponse(error_message=message)


def abort(code: grpc.StatusCode, details: str) -> Action:
    """An error of the whole call."""
    return lambda _server, context: context.abort(code, details)


def wait(seconds: float) -> Action:
    """Silence for so long."""
    return lambda _server, _context: time.sleep(seconds)


def hang() -> Action:
    """Silence, as of a model that died, until the client gives up."""

    def act(server: "FakeServer", context: Any) -> None:
        over = threading.Event()
        if context.add_callback(over.set):
            server.hanging.set()
            over.wait(30)

    return act


@dataclass
class FakeServer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Plays `script` for every stream, and `unary` for every unary call; keeps what it was sent."""

    script: list[Action] = field(default_factory=lambda: [step(1, 2, 0.5), step(2, 2, 1.0), result(), final()])
    unary: Action = field(default_factory=result)
    ready: threading.Event = field(default_factory=threading.Event)
    model_ready: bool = True
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    readiness_polls: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    hanging: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    half_closed: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def __enter__(self) -> Self:
        self.ready.set()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server and every call, at once."""
        self._server.stop(grace=None).wait(10)

    def sent(self, index: int = -1) -> dict[str, Any]:
        """The inputs of a request: bytes for BYTES, the number for one-element tensors, else the array."""
        request = self.requests[index]
        dtypes = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
        values: dict[str, Any] = {}
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            if tensor.datatype == "BYTES":
                (length,) = struct.unpack("<I", raw[:4])
                assert len(raw) == 4 + length
                values[tensor.name] = raw[4:]
            else:
                array = np.frombuffer(raw, dtypes[tensor.datatype]).reshape(tensor.shape)
                values[tensor.name] = array[0].item() if array.shape == (1,) else array
        return values

    # The service, in the spelling of the protocol.
    def ServerLive(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        self.readiness_polls.release()
        return service_pb2.ServerReadyResponse(ready=self.ready.is_set())

    def ModelReady(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=self.model_ready)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._keep(request, context)
        over = self._watch(context)
        response = self.unary(self, context)
        over.set()
        return service_pb2.ModelInferResponse() if response is None else response.infer_response

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        over = self._watch(context)
        for request in requests:
            self._keep(request, context)
            for action in self.script:
                response = action(self, context)
                if response is not None:
                    yield response
        over.set()
        self.half_closed.set()

    def _watch(self, context: Any) -> threading.Event:
        """An event to set when a call was played to its end; a call that ends before it sets `cancelled`."""
        over = threading.Event()

        def ended() -> None:
            if not over.is_set():
                self.cancelled.set()

        if not context.add_callback(ended):
            ended()
        return over

    def _keep(self, request: Any, context: Any) -> None:
        self.metadata.append(dict(context.invocation_metadata()))
        self.requests.append(request)
