"""What a batch asks of the other end, which is a server (gRPC) or a gateway in front of several (HTTP)."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from stepvideo_client.client import Client
from stepvideo_client.events import Result, StepEvent
from stepvideo_client.fields import Options, QuoteOptions


@dataclass(frozen=True)
class Cost:
    """What one clip takes on one server: seconds, and seconds of all its GPUs together."""

    seconds: float
    gpu_seconds: float


class Endpoint(Protocol):
    """One connection: closing that ends what it asked for, and nothing else. Every method raises ClientError."""

    @property
    def url(self) -> str:
        """As it was given."""

    def servers(self) -> int:
        """How many servers work there now, at least 1: each is to have clips."""

    def defaults(self) -> dict[str, Any]:
        """As Client.defaults."""

    def costs(self, options: QuoteOptions) -> Mapping[str, Cost]:
        """What a clip takes, by the server that tells; one at least. Raises InvalidRequest for what is refused, and
        ServiceUnavailable where none can tell."""

    def generate(self, image: bytes, prompt: str, options: Options) -> Generator[StepEvent | Result, None, None]:
        """As Client.generate. options: with priority and request_id; the same request_id gets the same run."""

    def settle(self, result: Result) -> None:
        """Tells the other end that the result is stored and need not be kept for this caller. Does not raise."""

    def close(self) -> None:
        """Cancels what runs, and closes the connection. Any thread may call."""


class GrpcEndpoint:
    """A server."""

    def __init__(self, url: str, client: Client) -> None:
        self._url, self._client = url, client

    @property
    def url(self) -> str:
        """As it was given."""
        return self._url

    def servers(self) -> int:
        """Always 1."""
        return 1

    def defaults(self) -> dict[str, Any]:
        """As Client.defaults."""
        return self._client.defaults()

    def costs(self, options: QuoteOptions) -> Mapping[str, Cost]:
        """The cost in the server's quote."""
        quote = self._client.quote(**options)
        return {self._url: Cost(quote.seconds, quote.gpu_seconds)}

    def generate(self, image: bytes, prompt: str, options: Options) -> Generator[StepEvent | Result, None, None]:
        """As Client.generate."""
        return self._client.generate(image, prompt, **options)

    def settle(self, result: Result) -> None:
        """The server forgets results by itself."""

    def close(self) -> None:
        """Cancels what runs."""
        self._client.close()
