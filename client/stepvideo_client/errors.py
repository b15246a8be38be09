"""Every error that this client raises on purpose.

ClientError
├── InvalidInput             INVALID_ARGUMENT: refused here, before anything was sent
├── ConnectionFailed         UNAVAILABLE
│   ├── ServerUnreachable    no connection, or it broke
│   ├── ServerNotReady       the server or the model was not ready in time
│   └── StreamStalled        the server went silent in the middle of a generation
├── MalformedResponse        INTERNAL: the answer is not what this client understands
└── RequestFailed            the server's answer to the request; `code` is whatever the server said
    ├── InvalidRequest       INVALID_ARGUMENT
    ├── QueueFull            RESOURCE_EXHAUSTED
    ├── ServiceUnavailable   UNAVAILABLE
    ├── DeadlineExceeded     DEADLINE_EXCEEDED
    ├── RequestCancelled     CANCELLED
    └── ServerFailed         INTERNAL

`code` is the canonical gRPC name of the status; `str(error)` is one sentence without the code.
"""

import re


class ClearTextWarning(UserWarning):
    """Calls to another machine are not encrypted."""


class ClientError(Exception):
    """Base of all errors of this package."""

    default_code = "INTERNAL"

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code: str = code or self.default_code


class InvalidInput(ClientError):
    """An argument cannot be sent: a missing file, a wrong type, a number that does not fit."""

    default_code = "INVALID_ARGUMENT"


class ConnectionFailed(ClientError):
    """There is no working server at the other end."""

    default_code = "UNAVAILABLE"


class ServerUnreachable(ConnectionFailed):
    """The connection could not be made, or broke."""


class ServerNotReady(ConnectionFailed):
    """The server or the model did not become ready in time."""


class StreamStalled(ConnectionFailed):
    """Nothing was received for the idle timeout, not even a sign of life: a stream to a model that died never ends by
    itself. A slow step is no reason: the server repeats its last response every 15 s."""


class MalformedResponse(ClientError):
    """The answer lacks something, or the stream ended without a result."""


class RequestFailed(ClientError):
    """The server refused or failed the request."""

    default_code = "UNKNOWN"


class InvalidRequest(RequestFailed):
    """An input is missing, malformed or out of range."""

    default_code = "INVALID_ARGUMENT"


class QueueFull(RequestFailed):
    """Too many requests are waiting: try again later."""

    default_code = "RESOURCE_EXHAUSTED"


class ServiceUnavailable(RequestFailed):
    """The service cannot take requests at the moment: try again later."""

    default_code = "UNAVAILABLE"


class DeadlineExceeded(RequestFailed):
    """The request's time limit ran out."""

    default_code = "DEADLINE_EXCEEDED"


class RequestCancelled(RequestFailed):
    """The request was cancelled, by another party than the caller of this client."""

    default_code = "CANCELLED"


class ServerFailed(RequestFailed):
    """Something broke on the server while it ran the request."""

    default_code = "INTERNAL"


_BY_CODE: dict[str, type[RequestFailed]] = {
    error.default_code: error
    for error in (InvalidRequest, QueueFull, ServiceUnavailable, DeadlineExceeded, RequestCancelled, ServerFailed)
}
# "CODE: sentence". Triton core may put a request id in front of what the model said.
_CODED = re.compile(rf"(?:\[request id: [^\]]*\] )?({'|'.join(_BY_CODE)}): (.+)")


def request_error(message: str, status: str | None = None) -> RequestFailed:
    """The typed error of a message from the server.

    The code is the one in front of "CODE: sentence"; without it `status` (a canonical gRPC name), or UNKNOWN,
    because messages on a gRPC stream carry no status and errors of Triton core carry no prefix. Only the first line
    is kept: Triton puts the traceback of a model's exception behind it.
    """
    line = message.strip().partition("\n")[0].rstrip()
    coded = _CODED.fullmatch(line)
    code, sentence = (coded[1], coded[2]) if coded else (status or "UNKNOWN", line)
    return _BY_CODE.get(code, RequestFailed)(sentence or f"The server gave no reason ({code}).", code)
