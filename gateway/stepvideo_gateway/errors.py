"""What callers and operators are told: one clear sentence each, with the code that the API has for it."""

from typing import Any


class ConfigError(Exception):
    """The configuration cannot be used; the gateway does not start."""


class ApiError(Exception):
    """An answer other than the one that was asked for.

    status  of HTTP
    code    a word for programs
    param   the field that is wrong
    retry   False: the client must not try again by itself
    """

    status = 500
    code = "server_error"
    kind = "server_error"
    retry = True

    def __init__(self, message: str, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.param, self.retry_after_s = param, retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients read."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What tells clients whether and when to try again."""
        headers = {} if self.retry else {"x-should-retry": "false"}
        return headers if self.retry_after_s is None else {**headers, "retry-after": f"{self.retry_after_s:.0f}"}


class BadRequest(ApiError):
    """The request is wrong."""

    status, code, kind, retry = 400, "invalid_value", "invalid_request_error", False


class Unauthorized(ApiError):
    """No key, or an unknown one."""

    status, code, kind, retry = 401, "invalid_api_key", "authentication_error", False


class Forbidden(ApiError):
    """The key does not allow that."""

    status, code, kind, retry = 403, "not_allowed", "permission_error", False


class NotFound(ApiError):
    """There is no such job, or it is somebody else's."""

    status, code, kind, retry = 404, "not_found", "invalid_request_error", False


class NotReady(ApiError):
    """The video is not there yet, or will never be."""

    status, code, kind, retry = 404, "video_not_ready", "invalid_request_error", False


class Conflict(ApiError):
    """An Idempotency-Key came with another request than before."""

    status, code, kind, retry = 422, "idempotency_mismatch", "invalid_request_error", False


class TooLarge(ApiError):
    """The body is larger than configured."""

    status, code, kind, retry = 413, "too_large", "invalid_request_error", False


class TooSlow(ApiError):
    """The body did not arrive in time."""

    status, code, kind = 408, "timeout", "invalid_request_error"


class TooMany(ApiError):
    """The queue is full."""

    status, code, kind = 429, "queue_full", "rate_limit_error"


class Unavailable(ApiError):
    """The database, the folder of videos or all servers are away."""

    status, code, kind = 503, "unavailable", "server_error"
