"""One request on a gRPC stream, received with a limit on silence.

tritonclient's own stream is not used: it allows one per client, and a cancelled one usually leaves a thread behind
that holds the request (8 such threads after 10 cancellations, with tritonclient 2.73.0 and grpcio 1.85.1).
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

_GOODBYE_S = 5.0


class RequestStream:
    """A ModelStreamInfer call that carries `request`. Leaving the context cancels what is not finished."""

    def __init__(self, stub: Any, request: Any, metadata: Sequence[tuple[str, str]]) -> None:
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._nothing_more_to_send = threading.Event()
        self._call = stub.ModelStreamInfer(self._outgoing(request), metadata=metadata)
        self._reader = threading.Thread(target=self._read, name="stepvideo-client-reader", daemon=True)
        self._reader.start()

    def receive(self, timeout_s: float | None) -> Any:
        """The next ModelStreamInferResponse, or None when the server has closed the stream.

        Raises queue.Empty after `timeout_s` seconds of silence (None: waits for ever), grpc.RpcError when the
        stream fails.
        """
        message = self._inbox.get(timeout=timeout_s)
        if isinstance(message, grpc.RpcError):
            raise message
        return message

    def finish(self) -> None:
        """Ends the stream politely, once the final response is in: the server closes it, without a cancellation."""
        self._nothing_more_to_send.set()
        self._reader.join(_GOODBYE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()  # does nothing on a call that is over
        self._nothing_more_to_send.set()
        self._reader.join(_GOODBYE_S)

    def _outgoing(self, request: Any) -> Iterator[Any]:
        yield request
        # Triton keeps answering while the client's side of the stream is open.
        self._nothing_more_to_send.wait()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._inbox.put(response)
            self._inbox.put(None)
        except grpc.RpcError as error:
            self._inbox.put(error)
