"""The client: generations and readiness over one gRPC channel."""

import os
import queue
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from stepvideo_client.address import host_port, is_loopback, joined, proxy_for
from stepvideo_client.errors import (
    ClientError,
    InvalidInput,
    MalformedResponse,
    ServerNotReady,
    ServerUnreachable,
    StreamStalled,
    request_error,
)
from stepvideo_client.events import Result, StepEvent, is_final, read_cancelled, read_response
from stepvideo_client.fields import Options, QuoteOptions
from stepvideo_client.options import inference_request, request_of
from stepvideo_client.quote import QUOTE_MODEL, Quote, read_defaults, read_quote
from stepvideo_client.stream import RequestStream

STREAM_MODEL = "ti2v"
UNARY_MODEL = "ti2v_unary"
CANCEL_MODEL = "ti2v_cancel"

_PROBE_TIMEOUT_S = 5.0
_QUESTION_TIMEOUT_S = 30.0
_POLL_S = 0.2
_FINAL_TIMEOUT_S = 5.0
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # The default grows to two minutes, and a server that has just started would be noticed that late.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Client:
    """A connection to a stepvideo-serve server; may be shared by threads, with many generations at once.

    url: host:port of the gRPC endpoint, without a scheme; without a port, 8001; an IPv6 address as [::1]:8001. Calls to
    loopback never go through a proxy, others through that of the environment (http_proxy, https_proxy, grpc_proxy).
    idle_timeout_s: a generation fails with StreamStalled
    when nothing at all was received for that long (None: never). A server that is well says something at least every
    15 s, however slow its steps are: silence means that the model's process or the connection is lost. headers: sent
    with every call, for instance for a gateway. TLS is used when `tls` is true or any of the PEM files is given:
    root_certificates (of the server's authority; the system's when absent), private_key and certificate_chain (this
    client's, for mutual TLS).

    Connects on first use. Closing it cancels the generations still running. Raises InvalidInput for PEM files that
    cannot be read.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        idle_timeout_s: float | None = 60.0,
        headers: Mapping[str, str] | None = None,
        tls: bool = False,
        root_certificates: str | os.PathLike[str] | None = None,
        private_key: str | os.PathLike[str] | None = None,
        certificate_chain: str | os.PathLike[str] | None = None,
    ) -> None:
        self._host, port = host_port(url)
        if idle_timeout_s is not None and not idle_timeout_s > 0:
            raise InvalidInput(f"The idle timeout must be more than 0 seconds, got {idle_timeout_s}.")
        self.url = joined(self._host, port)
        self._idle_timeout_s = idle_timeout_s
        # gRPC metadata keys are lower case.
        self._metadata = tuple((name.lower(), value) for name, value in (headers or {}).items())
        straight = (("grpc.enable_http_proxy", 0),) if is_loopback(self._host) else ()
        channel_options = (*_CHANNEL_OPTIONS, *straight)
        if tls or root_certificates or private_key or certificate_chain:
            credentials = grpc.ssl_channel_credentials(
                _pem(root_certificates), _pem(private_key), _pem(certificate_chain)
            )
            self._channel = grpc.secure_channel(self.url, credentials, options=channel_options)
        else:
            self._channel = grpc.insecure_channel(self.url, options=channel_options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def generate(
        self, image: bytes | str | os.PathLike[str], prompt: str, **options: Unpack[Options]
    ) -> Generator[StepEvent | Result, None, None]:
        """A generation, as an iterator of one StepEvent per denoising step that ends with the Result.

        image: the bytes of a PNG, JPEG or WebP file, or its path. The request is checked here and sent when the
        iteration starts. Closing the iterator before its end (also by an exception or Ctrl-C in the loop's body
        that lets it be collected) cancels the generation on the server; one with keep_s goes on, and `cancel` ends it.

        Raises InvalidInput at once; while iterating ServerUnreachable, StreamStalled, MalformedResponse, and the
        RequestFailed that the server answered with.
        """
        request = inference_request(STREAM_MODEL, image, prompt, options)
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        return self._events(request)

    def generate_unary(
        self,
        image: bytes | str | os.PathLike[str],
        prompt: str,
        *,
        deadline_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """A generation in one call without progress, through the model ti2v_unary.

        deadline_s: gives up, and cancels on the server, after that many seconds (None: waits for ever; prefer the
        option timeout_s, which the server keeps). An exception in the meantime (Ctrl-C) cancels on the server.
        Raises the same errors as `generate`.
        """
        request = inference_request(UNARY_MODEL, image, prompt, options)
        call = self._stub.ModelInfer.future(request, timeout=deadline_s, metadata=self._metadata)
        try:
            event = read_response(call.result())
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise self._failure(call) from error
        finally:
            call.cancel()  # does nothing on a call that is over
        if not isinstance(event, Result):
            raise MalformedResponse(f"Expected a result from {UNARY_MODEL}, got {event!r}.")
        return event

    def quote(self, **options: Unpack[QuoteOptions]) -> Quote:
        """What a generation would take. Raises InvalidInput, ServerUnreachable, MalformedResponse, ServiceUnavailable
        while the server has not measured everything that the quote needs, and other RequestFailed."""
        return read_quote(self._answer(request_of(QUOTE_MODEL, options, tuple(QuoteOptions.__annotations__))))

    def defaults(self) -> dict[str, Any]:
        """What the server fills in for options that are not given, by option: num_frames, height, width, steps,
        cfg_scale, time_shift and motion_score. Raises InvalidInput, ServerUnreachable, MalformedResponse, and other
        RequestFailed."""
        request = request_of(UNARY_MODEL, {"prompt": "", "image": b""}, ())
        request.parameters["probe"].bool_param = True
        return read_defaults(self._answer(request))

    def cancel(self, request_id: str) -> bool:
        """Ends the run of that request_id within a step, whoever began it, and forgets its result; whether the server
        knew either. Raises InvalidInput, ServerUnreachable, MalformedResponse, and other RequestFailed."""
        return read_cancelled(self._answer(request_of(CANCEL_MODEL, {"request_id": request_id}, ("request_id",))))

    def is_ready(self) -> bool:
        """Whether the server and its model ti2v take requests now."""
        return self._not_ready_because(_PROBE_TIMEOUT_S) is None

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns as soon as the server and its model ti2v take requests. Raises ServerNotReady after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while True:
            left_s = end - time.monotonic()
            reason = self._not_ready_because(min(max(left_s, _POLL_S), _PROBE_TIMEOUT_S))
            if reason is None:
                return
            if end - time.monotonic() <= _POLL_S:
                raise ServerNotReady(
                    f"The server at {self.url} is not ready after {timeout_s:g} s{self._by_way_of()}: {reason}."
                )
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Closes the connection and cancels the generations still running."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, request: Any) -> Any:
        """The ModelInferResponse to a question that costs the server nothing."""
        call = self._stub.ModelInfer.future(request, timeout=_QUESTION_TIMEOUT_S, metadata=self._metadata)
        try:
            return call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise self._failure(call) from error
        finally:
            call.cancel()  # does nothing on a call that is over

    def _events(self, request: Any) -> Generator[StepEvent | Result, None, None]:
        with RequestStream(self._stub, request, self._metadata) as stream:
            heard = "nothing"
            while True:
                response = self._receive(stream, heard)
                event = read_response(response)
                if isinstance(event, Result):
                    if is_final(response) or _reaches_final(stream):
                        stream.finish()
                    yield event
                    return
                if event is not None:
                    heard = f"step {event.step} of {event.total_steps}"
                    yield event
                if is_final(response):
                    raise MalformedResponse("The server ended the generation without a result: see the server's log.")

    def _receive(self, stream: RequestStream, heard: str) -> Any:
        """The next ModelInferResponse of a stream; `heard`: what came last, in words."""
        try:
            message = stream.receive(self._idle_timeout_s)
        except queue.Empty as error:
            raise StreamStalled(
                f"Nothing was received from {self.url} for {self._idle_timeout_s:g} s after {heard}, not even a sign "
                "of life, which also comes during a slow step: the model's process or the connection is dead, so send "
                "the request again once the server is ready."
            ) from error
        except grpc.RpcError as error:
            raise self._failure(error) from error
        if message is None:
            raise MalformedResponse("The server closed the stream without a result: see the server's log.")
        if message.error_message:
            raise request_error(message.error_message)
        return message.infer_response

    def _failure(self, call: Any) -> ClientError:
        """The typed error of a failed call (a grpc.Call, which the RpcError that it raises is too)."""
        failure = request_error(call.details() or "", call.code().name)
        if call.code() is grpc.StatusCode.UNAVAILABLE and not self._is_live():
            return ServerUnreachable(f"The server at {self.url} cannot be reached{self._by_way_of()}: {failure}.")
        return failure

    def _by_way_of(self) -> str:
        """What an error about the connection must add: the address in gRPC's own words is the proxy's."""
        proxy = proxy_for(self._host)
        return f" through the proxy of the environment, {proxy} (no_proxy={self._host} avoids it)" if proxy else ""

    def _is_live(self) -> bool:
        """Whether something at the other end answers gRPC calls."""
        try:
            self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=_PROBE_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return True

    def _not_ready_because(self, timeout_s: float) -> str | None:
        """Why no request can be taken now, or None when it can."""
        model = service_pb2.ModelReadyRequest(name=STREAM_MODEL)
        try:
            if not self._stub.ServerReady(
                service_pb2.ServerReadyRequest(), timeout=timeout_s, metadata=self._metadata
            ).ready:
                return "the server says that it is not ready"
            if not self._stub.ModelReady(model, timeout=timeout_s, metadata=self._metadata).ready:
                return f"the server says that the model {STREAM_MODEL} is not ready"
        except grpc.RpcError as error:
            return str(error.details() or error.code().name)
        return None


def _reaches_final(stream: RequestStream) -> bool:
    """Whether the empty final response follows soon; the result is complete without it."""
    try:
        message = stream.receive(_FINAL_TIMEOUT_S)
    except (queue.Empty, grpc.RpcError):
        return False
    return message is not None and not message.error_message and is_final(message.infer_response)


def _pem(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(f"The PEM file {os.fspath(path)!r} cannot be read: {error.strerror}.") from error
