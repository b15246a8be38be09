"""The client with threads: generations, quotes and cancelling over one gRPC channel (with asyncio: aio.py)."""

import os
import queue
import time
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from stepvideo_client.connection import (
    MODEL_NOT_READY,
    PROBE_TIMEOUT_S,
    QUESTION_TIMEOUT_S,
    SERVER_NOT_READY,
    STREAM_MODEL,
    UNARY_MODEL,
    Connection,
    response_in,
)
from stepvideo_client.errors import ClientError, MalformedResponse
from stepvideo_client.events import Result, StepEvent, is_final, read_cancelled, read_response
from stepvideo_client.fields import Options, QuoteOptions
from stepvideo_client.messages import cancel_request, probe_request, quote_request, stream_request
from stepvideo_client.options import inference_request
from stepvideo_client.quote import Quote, read_defaults, read_offer, read_quote
from stepvideo_client.stream import RequestStream

_POLL_S = 0.2
_FINAL_TIMEOUT_S = 5.0


class Client:
    """A connection to a stepvideo-serve server; may be shared by threads, with many generations at once.

    url: host:port of the gRPC endpoint, without a scheme; without a port, 8001; an IPv6 address as [::1]:8001. Calls to
    loopback never go through a proxy, others through that of the environment (http_proxy, https_proxy, grpc_proxy).
    idle_timeout_s: a generation fails with StreamStalled
    when nothing at all was received for that long (None: never). A server that is well says something at least every
    15 s, however slow its steps are: silence means that the model's process or the connection is lost. headers: sent
    with every call, for instance for a gateway. TLS is used when `tls` is true or any of the PEM files is given:
    root_certificates (of the server's authority; the system's when absent), private_key and certificate_chain (this
    client's, for mutual TLS). Without TLS, a connection to another machine is warned of (ClearTextWarning).

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
        self._to = Connection.of(url, idle_timeout_s, headers, tls, root_certificates, private_key, certificate_chain)
        self._to.warn_of_clear_text()
        self.url = self._to.url
        self._channel = self._to.channel(grpc)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def generate(
        self,
        image: bytes | str | os.PathLike[str],
        prompt: str,
        *,
        traceparent: str | None = None,
        **options: Unpack[Options],
    ) -> Generator[StepEvent | Result, None, None]:
        """A generation, as an iterator of one StepEvent per denoising step that ends with the Result.

        image: the bytes of a PNG, JPEG or WebP file, or its path. The request is checked here and sent when the
        iteration starts. Closing the iterator before its end (also by an exception or Ctrl-C in the loop's body
        that lets it be collected) cancels the generation on the server; one with keep_s goes on, and `cancel` ends it.
        traceparent: the W3C trace context that the server's spans join, in place of one in the client's headers.

        Raises InvalidInput at once; while iterating ServerUnreachable, StreamStalled, MalformedResponse, and the
        RequestFailed that the server answered with.
        """
        return self._events(stream_request(image, prompt, options), self._to.metadata_with(traceparent))

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
        call = self._stub.ModelInfer.future(request, timeout=deadline_s, metadata=self._to.metadata)
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
        return read_quote(self._answer(quote_request(options)))

    def defaults(self) -> dict[str, Any]:
        """What the server fills in for options that are not given, by option: num_frames, height, width, steps,
        cfg_scale, time_shift and motion_score. Raises InvalidInput, ServerUnreachable, MalformedResponse, and other
        RequestFailed."""
        return read_defaults(self._answer(probe_request()))

    def offer(self) -> dict[str, Any]:
        """What the server accepts: `defaults` as `defaults` gives them, `limits` by the keys of [limits] in serve.toml,
        and `presets`, the names that QUALITY has there. Raises InvalidInput, ServerUnreachable, MalformedResponse, also
        for a server that is too old to tell, and other RequestFailed."""
        return read_offer(self._answer(probe_request()))

    def cancel(self, request_id: str) -> bool:
        """Ends the run of that request_id within a step, whoever began it, and forgets its result; whether the server
        knew either. Raises InvalidInput, ServerUnreachable, MalformedResponse, and other RequestFailed."""
        return read_cancelled(self._answer(cancel_request(request_id)))

    def is_ready(self) -> bool:
        """Whether the server and its model ti2v take requests now."""
        return self._not_ready_because(PROBE_TIMEOUT_S) is None

    def why_not_ready(self) -> str | None:
        """The reason, in words, why the server and its model ti2v take no requests now; None when they do."""
        return self._not_ready_because(PROBE_TIMEOUT_S)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns as soon as the server and its model ti2v take requests. Raises ServerNotReady after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while True:
            left_s = end - time.monotonic()
            reason = self._not_ready_because(min(max(left_s, _POLL_S), PROBE_TIMEOUT_S))
            if reason is None:
                return
            if end - time.monotonic() <= _POLL_S:
                raise self._to.not_ready(timeout_s, reason)
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
        call = self._stub.ModelInfer.future(request, timeout=QUESTION_TIMEOUT_S, metadata=self._to.metadata)
        try:
            return call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise self._failure(call) from error
        finally:
            call.cancel()  # does nothing on a call that is over

    def _events(self, request: Any, metadata: tuple[tuple[str, str], ...]) -> Generator[StepEvent | Result, None, None]:
        with RequestStream(self._stub, request, metadata) as stream:
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
            message = stream.receive(self._to.idle_timeout_s)
        except queue.Empty as error:
            raise self._to.stalled(heard) from error
        except grpc.RpcError as error:
            raise self._failure(error) from error
        return response_in(message)

    def _failure(self, call: Any) -> ClientError:
        """The typed error of a failed call (a grpc.Call, which the RpcError that it raises is too)."""
        unavailable = call.code() is grpc.StatusCode.UNAVAILABLE
        return self._to.failure(call.details() or "", call.code().name, live=not unavailable or self._is_live())

    def _is_live(self) -> bool:
        """Whether something at the other end answers gRPC calls."""
        try:
            self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=PROBE_TIMEOUT_S, metadata=self._to.metadata)
        except grpc.RpcError as error:
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return True

    def _not_ready_because(self, timeout_s: float) -> str | None:
        """Why no request can be taken now, or None when it can."""
        model = service_pb2.ModelReadyRequest(name=STREAM_MODEL)
        try:
            if not self._stub.ServerReady(
                service_pb2.ServerReadyRequest(), timeout=timeout_s, metadata=self._to.metadata
            ).ready:
                return SERVER_NOT_READY
            if not self._stub.ModelReady(model, timeout=timeout_s, metadata=self._to.metadata).ready:
                return MODEL_NOT_READY
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
