"""Client of a stepvideo-serve server: a prompt and a first image in, step events and a video out, over gRPC.

from pathlib import Path
from stepvideo_client import Client, Result

with Client("127.0.0.1:8001") as client:
    for event in client.generate(Path("cat.png"), "a cat stretches", steps=30):
        if isinstance(event, Result):
            Path("cat.mp4").write_bytes(event.video)
        else:
            print(event.step, event.total_steps)

AsyncClient is the same for asyncio.
"""

from stepvideo_client.aio import AsyncClient
from stepvideo_client.camera import MOVEMENTS, with_camera
from stepvideo_client.client import Client
from stepvideo_client.errors import (
    ClearTextWarning,
    ClientError,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidInput,
    InvalidRequest,
    MalformedResponse,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    ServerFailed,
    ServerNotReady,
    ServerUnreachable,
    ServiceUnavailable,
    StreamStalled,
)
from stepvideo_client.events import Result, StepEvent
from stepvideo_client.fields import Options, QuoteOptions
from stepvideo_client.quote import Quote

__all__ = [
    "MOVEMENTS",
    "AsyncClient",
    "ClearTextWarning",
    "Client",
    "ClientError",
    "ConnectionFailed",
    "DeadlineExceeded",
    "InvalidInput",
    "InvalidRequest",
    "MalformedResponse",
    "Options",
    "QueueFull",
    "Quote",
    "QuoteOptions",
    "RequestCancelled",
    "RequestFailed",
    "Result",
    "ServerFailed",
    "ServerNotReady",
    "ServerUnreachable",
    "ServiceUnavailable",
    "StepEvent",
    "StreamStalled",
    "with_camera",
]
