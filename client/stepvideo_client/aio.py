"""The client for asyncio: generations, quotes and cancelling over one gRPC channel, without threads."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping
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

_POLL_S = 0.2
_FINAL_TIMEOUT_S = 5.0


class AsyncClient:
    """A connection to a stepvideo-serve server for one event loop, with many generations at once.

    The arguments, the methods and their errors are those of `Client`. Made inside a running loop:

        async with AsyncClient("127.0.0.1:8001") as client:
            async for event in client.generate("cat.png", "a cat stretches"):
                ...
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
        self._channel = self._to.channel(grpc.aio)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def generate(
        self,
        image: bytes | str | os.PathLike[str],
        prompt: str,
        *,
        traceparent: str | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[StepEvent | Result, None]:
        """A generation, as in `Client.generate`. Closing the iterator (`aclose`), or cancelling the task that iterates,
        cancels the generation on the server; one with keep_s goes on, and `cancel` ends it."""
        return self._events(stream_request(image, prompt, options), self._to.metadata_with(traceparent))

    async def generate_unary(
        self,
        image: bytes | str | os.PathLike[str],
        prompt: str,
        *,
        deadline_s: float | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """A generation in one call without progress, as in `Client.generate_unary`."""
        event = read_response(await self._call(inference_request(UNARY_MODEL, image, prompt, options), deadline_s))
        if not isinstance(event, Result):
            raise MalformedResponse(f"Expected a result from {UNARY_MODEL}, got {event!r}.")
        return event

    async def quote(self, **options: Unpack[QuoteOptions]) -> Quote:
        """What a generation would take, as in `Client.quote`."""
        return read_quote(await self._call(quote_request(options), QUESTION_TIMEOUT_S))

    async def defaults(self) -> dict[str, Any]:
        """What the server fills in, as in `Client.defaults`."""
        return read_defaults(await self._call(probe_request(), QUESTION_TIMEOUT_S))

    async def offer(self) -> dict[str, Any]:
        """What the server accepts, as in `Client.offer`."""
        return read_offer(await self._call(probe_request(), QUESTION_TIMEOUT_S))

    async def cancel(self, request_id: str) -> bool:
        """Ends a run by its request_id, as in `Client.cancel`."""
        return read_cancelled(await self._call(cancel_request(request_id), QUESTION_TIMEOUT_S))

    async def is_ready(self) -> bool:
        """Whether the server and its model ti2v take requests now."""
        return await self._not_ready_because(PROBE_TIMEOUT_S) is None

    async def why_not_ready(self) -> str | None:
        """The reason, in words, why the server and its model ti2v take no requests now; None when they do."""
        return await self._not_ready_because(PROBE_TIMEOUT_S)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns as soon as the server and its model ti2v take requests. Raises ServerNotReady after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while True:
            left_s = end - time.monotonic()
            reason = await self._not_ready_because(min(max(left_s, _POLL_S), PROBE_TIMEOUT_S))
            if reason is None:
                return
            if end - time.monotonic() <= _POLL_S:
                raise self._to.not_ready(timeout_s, reason)
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        """Closes the connection and cancels the generations still running."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, request: Any, timeout_s: float | None) -> Any:
        """The ModelInferResponse; cancelling the task cancels the call."""
        try:
            return await self._stub.ModelInfer(request, timeout=timeout_s, metadata=self._to.metadata)
        except grpc.aio.AioRpcError as error:
            raise await self._failure(error) from error

    async def _events(
        self, request: Any, metadata: tuple[tuple[str, str], ...]
    ) -> AsyncGenerator[StepEvent | Result, None]:
        call = self._stub.ModelStreamInfer(metadata=metadata)
        try:
            await self._write(call, request)
            heard = "nothing"
            while True:
                response = response_in(await self._read(call, heard))
                event = read_response(response)
                if isinstance(event, Result):
                    if is_final(response) or await _reaches_final(call):
                        await call.done_writing()
                        await _reads_to_the_end(call)
                    yield event
                    return
                if event is not None:
                    heard = f"step {event.step} of {event.total_steps}"
                    yield event
                if is_final(response):
                    raise MalformedResponse("The server ended the generation without a result: see the server's log.")
        finally:
            call.cancel()  # does nothing on a call that is over

    async def _write(self, call: Any, request: Any) -> None:
        try:
            await call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:  # the call has ended: its status says why
            raise await self._ended(call) from error

    async def _read(self, call: Any, heard: str) -> Any:
        """The next ModelStreamInferResponse, None at the end of the stream; `heard`: what came last, in words."""
        try:
            message = await asyncio.wait_for(call.read(), self._to.idle_timeout_s)
        except TimeoutError as error:
            raise self._to.stalled(heard) from error
        except grpc.aio.AioRpcError as error:
            raise await self._failure(error) from error
        return None if message is grpc.aio.EOF else message

    async def _ended(self, call: Any) -> ClientError:
        return await self._failure_of(await call.details() or "", await call.code())

    async def _failure(self, error: grpc.aio.AioRpcError) -> ClientError:
        return await self._failure_of(error.details() or "", error.code())

    async def _failure_of(self, details: str, code: grpc.StatusCode) -> ClientError:
        unavailable = code is grpc.StatusCode.UNAVAILABLE
        return self._to.failure(details, code.name, live=not unavailable or await self._is_live())

    async def _is_live(self) -> bool:
        """Whether something at the other end answers gRPC calls."""
        request = service_pb2.ServerLiveRequest()
        try:
            await self._stub.ServerLive(request, timeout=PROBE_TIMEOUT_S, metadata=self._to.metadata)
        except grpc.aio.AioRpcError as error:
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return True

    async def _not_ready_because(self, timeout_s: float) -> str | None:
        """Why no request can be taken now, or None when it can."""
        with_limit: dict[str, Any] = {"timeout": timeout_s, "metadata": self._to.metadata}
        try:
            if not (await self._stub.ServerReady(service_pb2.ServerReadyRequest(), **with_limit)).ready:
                return SERVER_NOT_READY
            model = service_pb2.ModelReadyRequest(name=STREAM_MODEL)
            if not (await self._stub.ModelReady(model, **with_limit)).ready:
                return MODEL_NOT_READY
        except grpc.aio.AioRpcError as error:
            return str(error.details() or error.code().name)
        return None


async def _reaches_final(call: Any) -> bool:
    """Whether the empty final response follows soon; the result is complete without it."""
    try:
        message = await asyncio.wait_for(call.read(), _FINAL_TIMEOUT_S)
    except (TimeoutError, grpc.aio.AioRpcError):
        return False
    return message is not grpc.aio.EOF and not message.error_message and is_final(message.infer_response)


async def _reads_to_the_end(call: Any) -> None:
    """Until the server has closed the stream, so that it does not hear of a cancellation."""
    try:
        await asyncio.wait_for(call.read(), _FINAL_TIMEOUT_S)
    except (TimeoutError, grpc.aio.AioRpcError):
        return
