"""Requests to a running server over its three ways in, and what comes back, without any code of our client.

Values are numpy arrays as they go on the wire; a `bytes` value is a BYTES tensor of shape [1].
"""

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import grpc
import numpy as np
import psutil
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, serialize_byte_tensor

from stepvideo_serve.launch.boundary import INTERNAL_MODELS, PARAMETER, VARIABLE

Values = Mapping[str, NDArray[Any] | bytes]
Outputs = dict[str, NDArray[Any]]
Metadata = Sequence[tuple[str, str]]

PATIENCE_S = 120.0  # the machine may be busy; nothing in these tests takes this long
CODED = re.compile("(INVALID_ARGUMENT|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED|INTERNAL): ")
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Refused(Exception):
    """The server answered with an error: its text, and the transport's status (a gRPC stream has none)."""

    def __init__(self, text: str, status: str | None) -> None:
        super().__init__(f"{status}: {text}")
        self.text, self.status = text, status

    @property
    def by_core(self) -> bool:
        """Whether it was Triton that refused, not one of our models."""
        return CODED.match(self.text) is None


@dataclass
class Answer:
    """A whole stream: its progress responses in order, those that told of its place in the queue, the result (empty
    after an error), and what came last."""

    progress: list[Outputs] = field(default_factory=list)
    waits: list[Outputs] = field(default_factory=list)
    result: Outputs = field(default_factory=dict)
    ended_empty: bool = False


class Stream:
    """One request, a ModelInferRequest, on a stream of its own. Leaving the context cancels what has not ended.

    A stream that has ended is closed, not cancelled: Triton 24.10 keeps the requests of cancelled streams until others
    need their place, and cannot unload the model before.
    """

    def __init__(self, url: str, request: Any, metadata: Metadata = ()) -> None:
        self._channel = grpc.insecure_channel(url, options=CHANNEL_OPTIONS)
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._done = threading.Event()
        self._ended = False
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._call = stub.ModelStreamInfer(self._outgoing(request), metadata=metadata)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def next(self, timeout_s: float = PATIENCE_S) -> tuple[Outputs, bool]:
        """The next response and whether it is the final one. Raises Refused, or queue.Empty after the timeout."""
        message = self._inbox.get(timeout=timeout_s)
        if isinstance(message, grpc.RpcError):
            raise Refused(message.details(), message.code().name)
        if message.error_message:
            raise Refused(message.error_message, None)
        response = message.infer_response
        self._ended = response.parameters["triton_final_response"].bool_param
        return outputs_of(response), self._ended

    def refusal(self) -> Refused:
        """The error that comes next, and then the empty final response."""
        try:
            outputs, _ = self.next()
        except Refused as refused:
            if not refused.by_core:
                assert self.next() == ({}, True)
            return refused
        raise AssertionError(f"an error was expected, {sorted(outputs)} came")

    def silent(self) -> bool:
        """Whether everything that has come so far was taken."""
        return self._inbox.empty()

    def wait_for_step(self, step: int) -> Outputs:
        """The progress of this step; what came before it is thrown away."""
        while True:
            outputs, final = self.next()
            assert not final, "the stream ended before the step"
            if "STEP" in outputs and outputs["STEP"][0] >= step:
                return outputs

    def collect(self) -> Answer:
        """Everything up to the final response."""
        answer = Answer()
        while True:
            outputs, final = self.next()
            if "QUEUE_POSITION" in outputs:
                answer.waits.append(outputs)
            elif "STEP" in outputs:
                answer.progress.append(outputs)
            elif outputs:
                assert not answer.result, "a second result"
                answer.result = outputs
            if final:
                answer.ended_empty = not outputs
                return answer

    def cancel(self) -> None:
        self._call.cancel()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            self._call.cancel()
        self._done.set()
        self._reader.join()
        self._channel.close()

    def _outgoing(self, request: Any) -> Iterator[Any]:
        yield request
        self._done.wait()  # a stream is answered while the client's side is open

    def _read(self) -> None:
        try:
            for message in self._call:
                self._inbox.put(message)
        except grpc.RpcError as error:
            self._inbox.put(error)


@dataclass(frozen=True)
class Server:
    """Where a running server is. `inside`: internal models are called as the server's own models call them, which needs
    its user's right to read the environment of its processes; else as everybody may."""

    grpc_url: str
    http_url: str
    pid: int
    inside: bool = True

    @cached_property
    def token(self) -> str:
        """What the server's models know each other by."""
        token: str = psutil.Process(self.pid).environ()[VARIABLE]
        return token

    def open(self, values: Values, model: str = "ti2v") -> Stream:
        return Stream(self.grpc_url, grpc_request(model, values, self._token_for(model)))

    def _token_for(self, model: str) -> str | None:
        return self.token if self.inside and model in INTERNAL_MODELS else None

    def stream(self, values: Values, model: str = "ti2v") -> Answer:
        """A request on a gRPC stream, to its end."""
        with self.open(values, model) as stream:
            return stream.collect()

    def stream_result(self, values: Values) -> Outputs:
        return self.stream(values).result

    def grpc(self, values: Values, model: str = "ti2v_unary") -> Outputs:
        """A unary gRPC request."""
        with self.grpc_call(values, model) as call:
            try:
                return outputs_of(call.result())
            except grpc.RpcError as error:
                raise Refused(call.details(), call.code().name) from error

    def run(self, values: Values, model: str) -> list[Outputs]:
        """A run of a model that queues them, begun and fetched to its end: its responses."""
        self.grpc(values, model)
        return self.run_on(values["RUN_ID"], model)

    def run_on(self, run_id: NDArray[Any] | bytes, model: str) -> list[Outputs]:
        """The responses that are left of a run."""
        responses: list[Outputs] = []
        while "ENDED" not in (outputs := self.grpc({"NEXT_OF": run_id}, model)):
            responses += [outputs] if outputs else []
        return responses

    def waiting(self) -> int:
        """How many runs wait for the ranks."""
        return int(report_of(self.grpc({"KIND": b"pace"}, "dit_denoiser"))["waiting"])

    @contextmanager
    def grpc_call(self, values: Values, model: str = "ti2v_unary", timeout_s: float = PATIENCE_S) -> Iterator[Any]:
        """A unary gRPC request under way, as a grpc future."""
        with grpc.insecure_channel(self.grpc_url, options=CHANNEL_OPTIONS) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            yield stub.ModelInfer.future(grpc_request(model, values, self._token_for(model)), timeout=timeout_s)

    def http(self, values: Values, model: str = "ti2v_unary") -> Outputs:
        """An HTTP request with binary tensors."""
        inputs = http_inputs(values)
        with tritonclient.http.InferenceServerClient(self.http_url, network_timeout=PATIENCE_S) as client:
            try:
                token = self._token_for(model)
                result = client.infer(model, inputs, parameters=None if token is None else {PARAMETER: token})
            except InferenceServerException as error:
                raise Refused(error.message(), error.status()) from error
            return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}

    def process(self, marker: str) -> psutil.Process:
        """The one process of the server with `marker` in its command line."""
        [found] = [child for child in psutil.Process(self.pid).children(recursive=True) if marker in command(child)]
        return found

    def rank(self) -> psutil.Process:
        """The process that computes the denoising steps."""
        return self.process("stepvideo_serve.parallel.rank_process")

    def executions(self, model: str) -> int:
        """How many requests the model has taken."""
        with tritonclient.http.InferenceServerClient(self.http_url) as client:
            stats = client.get_inference_statistics(model)["model_stats"][0]
        return int(stats["execution_count"])


def unary(url: str, request: Any, metadata: Metadata = ()) -> Outputs:
    """The outputs that a ModelInferRequest is answered with. Raises Refused."""
    with grpc.insecure_channel(url, options=CHANNEL_OPTIONS) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            return outputs_of(stub.ModelInfer(request, metadata=metadata, timeout=PATIENCE_S))
        except grpc.RpcError as error:
            raise Refused(error.details(), error.code().name) from error


def command(process: psutil.Process) -> str:
    """Its command line; empty when the process has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def as_array(value: NDArray[Any] | bytes) -> NDArray[Any]:
    return np.array([value], np.object_) if isinstance(value, bytes) else value


def http_inputs(values: Values) -> list[Any]:
    """The InferInputs with binary tensors."""
    inputs = []
    for name, value in values.items():
        array = as_array(value)
        tensor = tritonclient.http.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        inputs.append(tensor.set_data_from_numpy(array))
    return inputs


def grpc_request(model: str, values: Values, token: str | None = None) -> Any:
    """The ModelInferRequest with raw contents."""
    request = service_pb2.ModelInferRequest(model_name=model)
    if token is not None:
        request.parameters[PARAMETER].string_param = token
    for name, value in values.items():
        array = as_array(value)
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        raw = serialize_byte_tensor(array).item() if array.dtype == np.object_ else array.tobytes()
        request.raw_input_contents.append(raw)
    return request


def outputs_of(response: Any) -> Outputs:
    result = InferResult(response)
    return {output.name: result.as_numpy(output.name) for output in response.outputs}


def report_of(outputs: Outputs) -> dict[str, Any]:
    report = json.loads(outputs["REPORT"][0])
    assert isinstance(report, dict)
    return report


def until(condition: Callable[[], bool], what: str) -> None:
    """Polls for what the server tells only when asked."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {PATIENCE_S:g} s for {what}"
        time.sleep(0.02)


def cpu_s(process: psutil.Process) -> float:
    """CPU time that the process has used: unlike wall time, other work on the machine does not show in it."""
    times = process.cpu_times()
    return float(times.user + times.system)
