"""Messages between the parent and a rank: one JSON object each, preceded by its length, over a socket pair.

parent -> rank   start   factory, settings, heartbeat_s, arena_bytes, file descriptors   once, first
                 job     id, params, tensors                                 one at a time
                 ack     id                     the last report has been taken and its tensors copied out
                 cancel  id                     end the job at the next opportunity
                 shutdown
rank -> parent   beat                           every heartbeat_s, whatever else the rank does
                 ready   info                   the factory has returned
                 mark                           a step of the job has ended
                 report  id, params, tensors    leader only
                 done    id, params, tensors    end of a job; empty params and no tensors except from the leader
                 raised  error                  end of a job, or of the start
"""

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from stepvideo_serve import errors
from stepvideo_serve.errors import InvalidRequest, RequestError, StepVideoError, WorkerFailed

MESSAGE_LIMIT_BYTES = 1 << 20
LENGTH_BYTES = 4
READ_BYTES = 1 << 16
SENTENCE_LIMIT = 2000  # characters of an exception's message

JsonObject = dict[str, Any]


class ChannelClosedError(Exception):
    """The other side is gone, or no longer follows the protocol."""


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as it goes over the wire; InvalidRequest when it is too long, TypeError when it is not JSON."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MESSAGE_LIMIT_BYTES:
        raise InvalidRequest(
            f"A message between the server and its ranks may have {MESSAGE_LIMIT_BYTES} bytes, got {len(body)}: "
            f"pass large data as tensors."
        )
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


class Channel:
    """One end of the socket pair. Any thread may send; one thread receives.

    `send_timeout_s` limits a send; None where only the death of the other side may end it.
    """

    def __init__(self, sock: socket.socket, send_timeout_s: float | None) -> None:
        self._socket = sock
        self._received = bytearray()
        self._send_lock = threading.RLock()  # reentrant: a Run may be finalised, and cancel, at any point
        if send_timeout_s is not None:  # the kernel's limit for sending; Python's would apply to receiving, too
            seconds, part = divmod(send_timeout_s, 1)
            timeval = struct.pack("ll", int(seconds), int(part * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def fileno(self) -> int:
        """The descriptor for poll(): readable with a message, with a part of one, or at the end of the stream."""
        return self._socket.fileno()

    def send(self, wire: bytes) -> None:
        """Send what `encode` returned; ChannelClosedError when the other side is gone or does not read."""
        with self._send_lock:
            try:
                # Without MSG_NOSIGNAL a dead rank could kill an embedding process that does not ignore SIGPIPE.
                self._socket.sendall(wire, socket.MSG_NOSIGNAL)
            except OSError as error:
                # Half of the message may have been sent: end the stream, so that both sides notice.
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                raise ChannelClosedError(f"a message could not be sent ({error})") from error

    def receive(self) -> JsonObject:
        """Wait for the next message, without a limit; ChannelClosedError at the end of the stream."""
        while (message := self._next_message()) is None:
            if not self._read(0):
                raise ChannelClosedError("the other side closed the channel")
        return message

    def drain(self) -> list[JsonObject]:
        """The complete messages, without waiting; ChannelClosedError at the end of the stream, once all of them were
        taken. The beginning of a message stays until its rest has come."""
        messages = []
        open_ = True
        while open_:
            try:
                open_ = self._read(socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            while (message := self._next_message()) is not None:
                messages.append(message)
        if not open_ and not messages:
            raise ChannelClosedError("the other side closed the channel")
        return messages

    def close(self) -> None:
        """Close this end; calling it again does nothing."""
        with self._send_lock:
            self._socket.close()

    def _read(self, flags: int) -> bool:
        """Read the bytes that have come; False at the end of the stream."""
        try:
            part = self._socket.recv(READ_BYTES, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ChannelClosedError(f"a message could not be read ({error})") from error
        self._received += part
        return bool(part)

    def _next_message(self) -> JsonObject | None:
        """The first message of what was received, or None while it is not complete."""
        if len(self._received) < LENGTH_BYTES:
            return None
        end = LENGTH_BYTES + int.from_bytes(self._received[:LENGTH_BYTES], "big")
        if end > LENGTH_BYTES + MESSAGE_LIMIT_BYTES:
            raise ChannelClosedError(f"a message of {end} bytes came, {MESSAGE_LIMIT_BYTES} are allowed")
        if len(self._received) < end:
            return None
        try:
            message = json.loads(self._received[LENGTH_BYTES:end])
        except ValueError as error:
            raise ChannelClosedError(f"a message could not be read ({error})") from error
        del self._received[:end]
        if not isinstance(message, dict) or "kind" not in message:
            raise ChannelClosedError(f"a message without a kind came: {message!r}")
        return message


def error_to_json(error: BaseException) -> JsonObject:
    """An exception as JSON: its nearest class in errors.py (or null), its own type, and one line of text."""
    known = (base.__name__ for base in type(error).__mro__ if base.__module__ == errors.__name__)
    text = str(error) if isinstance(error, StepVideoError) else " ".join(str(error).split())
    return {"class": next(known, None), "type": type(error).__name__, "message": text[:SENTENCE_LIMIT]}


def error_from_json(description: Mapping[str, Any], where: str) -> RequestError:
    """The RequestError that a rank raised; any other exception becomes WorkerFailed, with `where` in its sentence."""
    for known in _subclasses(RequestError):
        if known.__name__ == description["class"]:
            return known(description["message"])
    return WorkerFailed(f"{where}: {description['type']}: {description['message'].rstrip('.')}.")


def _subclasses(root: type[RequestError]) -> Iterator[type[RequestError]]:
    yield root
    for child in root.__subclasses__():
        yield from _subclasses(child)
