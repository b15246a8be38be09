"""HTTP to a gateway: JSON there and back, and what its refusals mean."""

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from stepvideo_client.address import is_loopback
from stepvideo_client.errors import (
    ClientError,
    InvalidInput,
    InvalidRequest,
    MalformedResponse,
    RequestFailed,
    ServerUnreachable,
    request_error,
)

SCHEMES: Final = ("http://", "https://")
KEY_VARIABLE: Final = "STEPVIDEO_API_KEY"
_CODES: Final = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "UNAVAILABLE",
}
_UNAUTHORIZED: Final = 401
_REFUSED: Final = {_UNAUTHORIZED: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}
_SHOWN: Final = 300


@dataclass(frozen=True)
class Answer:
    """The body as it came, and the headers."""

    content: bytes
    headers: Mapping[str, str]

    def json(self) -> dict[str, Any]:
        """The object in it. Raises MalformedResponse."""
        try:
            values = json.loads(self.content)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise MalformedResponse(f"The gateway must answer with a JSON object, got {_start_of(self.content)!r}.")
        return values


class GatewayHttp:
    """Calls to the gateway at `url`; any thread may.

    headers: sent with every call. tls: of https; timeout_s: of silence during a call. Loopback never goes through a
    proxy, others through that of the environment. Redirects are not followed: the key would go along.
    """

    def __init__(self, url: str, headers: Mapping[str, str], tls: ssl.SSLContext | None, timeout_s: float) -> None:
        parts = gateway_address(url)
        self._base = parts.geturl()
        self._headers, self._timeout_s = dict(headers), timeout_s
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if is_loopback(parts.hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))
        if tls is not None:
            handlers.append(urllib.request.HTTPSHandler(context=tls))
        self._opener = urllib.request.build_opener(*handlers)

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        accepted: Collection[int] = (),
    ) -> Answer:
        """The answer to `method` of `path`, with a body of JSON. accepted: statuses other than 2xx that are answers,
        too. Raises ServerUnreachable, MalformedResponse, and the RequestFailed that the gateway answered with."""
        content = None if body is None else json.dumps(body).encode()
        sent = {**self._headers, **(headers or {}), **({} if content is None else {"Content-Type": "application/json"})}
        request = urllib.request.Request(f"{self._base}{path}", content, sent, method=method)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                return Answer(answer.read(), dict(answer.headers.items()))
        except urllib.error.HTTPError as error:
            with error:
                said = _read(error)
            if error.code in accepted:
                return Answer(said, dict(error.headers.items()))
            raise self._failure(error.code, path, said, error.headers.get("location")) from error
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise ServerUnreachable(f"The gateway at {self._base} cannot be reached: {reason}.") from error

    def _failure(self, status: int, path: str, content: bytes, location: str | None) -> ClientError:
        if 300 <= status < 400:
            return InvalidRequest(
                f"The gateway at {self._base} sends callers on to {location!r}, and a key must not go there unseen: "
                "name that address, if it is right."
            )
        sentence = _sentence(content)
        if sentence is None:
            sentence = f"{self._base}{path} answers {status}, not in the words of a gateway: {_start_of(content)!r}."
        if status in _REFUSED:
            hint = f" The key is read from {KEY_VARIABLE}." if status == _UNAUTHORIZED else ""
            return InvalidRequest(f"{sentence}{hint}", _REFUSED[status])
        code = _CODES.get(status, "UNKNOWN")
        return RequestFailed(sentence, code) if code == "NOT_FOUND" else request_error(sentence, code)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Nothing is asked instead."""


def gateway_address(url: str) -> SplitResult:
    """http(s)://HOST[:PORT][/PATH], without the /v1 that OpenAI's clients name. Raises InvalidInput."""
    wrong = InvalidInput(f"The gateway's url must be http(s)://HOST[:PORT], perhaps with a path, got {url!r}.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise wrong from error
    unfit = parts.query or parts.fragment or "@" in parts.netloc or " " in url or port == 0
    if f"{parts.scheme}://" not in SCHEMES or not parts.hostname or unfit or not url.isascii():
        raise wrong
    return parts._replace(path=parts.path.rstrip("/").removesuffix("/v1"))


def _read(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def _sentence(content: bytes) -> str | None:
    """What a gateway says of its refusal; None where it was not a gateway that answered."""
    try:
        said = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return None
    return said if isinstance(said, str) else None


def _start_of(content: bytes) -> str:
    return content[:_SHOWN].decode(errors="replace").strip()
