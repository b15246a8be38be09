"""What both clients, with threads and with asyncio, know of a connection: where it goes, and what its faults mean."""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from stepvideo_client.address import clear_text_warning, host_port, is_loopback, joined, proxy_for
from stepvideo_client.errors import (
    ClearTextWarning,
    ClientError,
    InvalidInput,
    MalformedResponse,
    ServerNotReady,
    ServerUnreachable,
    StreamStalled,
    request_error,
)

STREAM_MODEL = "ti2v"
UNARY_MODEL = "ti2v_unary"

PROBE_TIMEOUT_S = 5.0
QUESTION_TIMEOUT_S = 30.0
SERVER_NOT_READY = "the server says that it is not ready"
MODEL_NOT_READY = f"the server says that the model {STREAM_MODEL} is not ready"

_TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # The default grows to two minutes, and a server that has just started would be noticed that late.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

Pem = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Connection:
    """Where calls go and what they carry.

    host, url       without and with the port
    idle_timeout_s  of silence on a stream; None: any
    metadata        sent with every call
    credentials     of TLS; None: in clear text
    """

    host: str
    url: str
    idle_timeout_s: float | None
    metadata: tuple[tuple[str, str], ...]
    credentials: grpc.ChannelCredentials | None

    @classmethod
    def of(
        cls,
        url: str,
        idle_timeout_s: float | None,
        headers: Mapping[str, str] | None,
        tls: bool,
        root_certificates: Pem,
        private_key: Pem,
        certificate_chain: Pem,
    ) -> Self:
        """The connection that the arguments of a client describe. Raises InvalidInput."""
        host, port = host_port(url)
        if idle_timeout_s is not None and not idle_timeout_s > 0:
            raise InvalidInput(f"The idle timeout must be more than 0 seconds, got {idle_timeout_s}.")
        # gRPC metadata keys are lower case.
        metadata = tuple((name.lower(), value) for name, value in (headers or {}).items())
        credentials = None
        if tls or root_certificates or private_key or certificate_chain:
            credentials = grpc.ssl_channel_credentials(
                _pem(root_certificates), _pem(private_key), _pem(certificate_chain)
            )
        return cls(host, joined(host, port), idle_timeout_s, metadata, credentials)

    def metadata_with(self, traceparent: str | None) -> tuple[tuple[str, str], ...]:
        """The metadata of a call that belongs to a trace. Raises InvalidInput."""
        if traceparent is None:
            return self.metadata
        if not _TRACEPARENT.fullmatch(traceparent):
            raise InvalidInput(
                "traceparent must be two, 32, 16 and two hexadecimal digits with hyphens between (W3C trace context), "
                f"got {traceparent[:80]!r}."
            )
        return (*(pair for pair in self.metadata if pair[0] != "traceparent"), ("traceparent", traceparent))

    def channel(self, maker: Any) -> Any:
        """A channel of `grpc` or of `grpc.aio`, which connects on first use."""
        straight = (("grpc.enable_http_proxy", 0),) if is_loopback(self.host) else ()
        options = (*_CHANNEL_OPTIONS, *straight)
        if self.credentials is None:
            return maker.insecure_channel(self.url, options=options)
        return maker.secure_channel(self.url, self.credentials, options=options)

    def warn_of_clear_text(self) -> None:
        """Warns with ClearTextWarning, at the line that makes the client, where other machines can read the calls."""
        names = tuple(name for name, _ in self.metadata)
        if (sentence := clear_text_warning(self.url, self.credentials is not None, names)) is not None:
            warnings.warn(sentence, ClearTextWarning, stacklevel=3)

    def failure(self, details: str, code: str, live: bool) -> ClientError:
        """The typed error of a failed call; `live`: whether something at the other end answers."""
        failure = request_error(details, code)
        if code == grpc.StatusCode.UNAVAILABLE.name and not live:
            return ServerUnreachable(f"The server at {self.url} cannot be reached{self._by_way_of()}: {failure}.")
        return failure

    def stalled(self, heard: str) -> StreamStalled:
        """The error of a silent stream; `heard`: what came last, in words."""
        return StreamStalled(
            f"Nothing was received from {self.url} for {self.idle_timeout_s:g} s after {heard}, not even a sign of "
            "life, which also comes during a slow step: the model's process or the connection is dead, so send the "
            "request again once the server is ready."
        )

    def not_ready(self, timeout_s: float, reason: str) -> ServerNotReady:
        """The error of a wait that was too short."""
        return ServerNotReady(
            f"The server at {self.url} is not ready after {timeout_s:g} s{self._by_way_of()}: {reason}."
        )

    def _by_way_of(self) -> str:
        """What an error about the connection must add: the address in gRPC's own words is the proxy's."""
        proxy = proxy_for(self.host)
        return f" through the proxy of the environment, {proxy} (no_proxy={self.host} avoids it)" if proxy else ""


def response_in(message: Any) -> Any:
    """The ModelInferResponse in a message of a stream; None: the server has closed the stream.

    Raises MalformedResponse, and the RequestFailed that the server answered with.
    """
    if message is None:
        raise MalformedResponse("The server closed the stream without a result: see the server's log.")
    if message.error_message:
        raise request_error(message.error_message)
    return message.infer_response


def _pem(path: Pem) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(f"The PEM file {os.fspath(path)!r} cannot be read: {error.strerror}.") from error
