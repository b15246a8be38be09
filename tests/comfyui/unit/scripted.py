"""A gateway that does what a test says: falls silent, hangs up, loses its server. A real one cannot be told to."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from PIL import Image

from comfyui.address import Address
from comfyui.gateway import Gateway, connected
from comfyui.request import Request, png_of

Script = Callable[["Scripted", web.StreamResponse], Awaitable[None]]
ASKED = {"num_frames": "17", "num_inference_steps": "4"}


@dataclass
class Recorder:
    """A Host that keeps what it is shown, and is interrupted after `patience` looks (-1: never)."""

    patience: int = -1
    texts: list[str] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)

    def interrupted(self) -> bool:
        self.patience -= self.patience > 0
        return self.patience == 0

    async def progress(self, value: float, most: float, picture: Any | None) -> None:
        self.steps.append((value, most))
        self.pictures += [] if picture is None else [picture]

    def say(self, text: str) -> None:
        if text not in self.texts[-1:]:
            self.texts.append(text)


class Scripted:
    """The gateway. `streams`: what each connection to the events does, the last one again and again."""

    def __init__(self, *streams: Script, status: str = "queued", content: bytes = b"mp4") -> None:
        self.streams, self.content, self.well = list(streams), content, True
        self.calls: list[str] = []
        self.keys: list[str] = []
        self.created: list[str] = [status]  # the status of each job that is made; the last one again and again
        self.refusals: list[web.Response] = []  # of the first calls that make a job
        self.slow_s = 0.0
        self.deleted = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/videos", self.create)
        app.router.add_get("/v1/videos/v1", self.retrieve)
        app.router.add_delete("/v1/videos/v1", self.delete)
        app.router.add_get("/v1/videos/v1/content", self.handed_out)
        app.router.add_get("/v1/videos/v1/events", self.events)
        app.router.add_get("/health", self.health)
        return app

    async def create(self, request: web.Request) -> web.Response:
        self.calls.append("create")
        self.keys.append(request.headers["Idempotency-Key"])
        await request.post()
        await asyncio.sleep(self.slow_s)
        if self.refusals:
            return self.refusals.pop(0)
        status = self.created.pop(0) if len(self.created) > 1 else self.created[0]
        return web.json_response(video(status=status))

    async def retrieve(self, _: web.Request) -> web.Response:
        return web.json_response(video())

    async def delete(self, _: web.Request) -> web.Response:
        self.calls.append("delete")
        self.deleted.set()
        return web.json_response({"deleted": True})

    async def handed_out(self, _: web.Request) -> web.Response:
        self.calls.append("content")
        return web.Response(body=self.content)

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"well": self.well}, status=200 if self.well else 503)

    async def events(self, request: web.Request) -> web.StreamResponse:
        self.calls.append("events")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        stream = self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]
        await stream(self, response)
        return response


def says(*videos: dict[str, Any], then: Script | None = None, seen: Callable[[int], bool] = lambda _: True) -> Script:
    """A stream that has these video objects and previews, and then ends, or does something else. It goes on when what
    it has said so far is `seen`."""

    async def stream(scripted: Scripted, response: web.StreamResponse) -> None:
        for said, one in enumerate(videos, 1):
            name = "progress" if "status" in one else "preview" if "data" in one else "deleted"
            await response.write(f": a comment\nevent: video.{name}\ndata: {json.dumps(one)}\n\n".encode())
            while not seen(said):
                await asyncio.sleep(0.005)
        if then is not None:
            await then(scripted, response)

    return stream


async def silent(scripted: Scripted, _: web.StreamResponse) -> None:
    """Says nothing more, until the job is deleted."""
    await scripted.deleted.wait()


def refusal(status: int, sentence: str, code: str = "invalid_value") -> web.Response:
    return web.json_response({"error": {"message": sentence, "type": "x", "param": None, "code": code}}, status=status)


def video(**more: Any) -> dict[str, Any]:
    """A video object as the gateway shows it."""
    times = {"created_at": 1000, "completed_at": None, "expires_at": None}
    shown = {"id": "v1", "object": "video", "status": "queued", "progress": 0, "seconds": "0.68", "size": "96x64"}
    return {**shown, **times, "seed": 7, "error": None, "queue_position": None, "step": 0, "total_steps": 0, **more}


def running(step: int, **more: Any) -> dict[str, Any]:
    return video(status="in_progress", step=step, total_steps=4, **more)


DONE = video(status="completed", progress=100, completed_at=1012, step=4, total_steps=4)


def animation(*greys: int, milliseconds: int = 100) -> bytes:
    """A WebP of that many grey frames."""
    first, *others = (Image.new("RGB", (16, 16), (grey, grey, grey)) for grey in greys)
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, duration=milliseconds, lossless=True)
    return file.getvalue()


def text_of(file: bytes) -> str:
    return base64.b64encode(file).decode()


def picture(grey: float = 0.5) -> bytes:
    import torch

    return png_of(torch.full((1, 8, 8, 3), grey))


def request(**more: str) -> Request:
    return Request({**ASKED, **more}, picture())


@asynccontextmanager
async def serving(scripted: Scripted, idle_timeout_s: float = 60.0) -> AsyncIterator[Gateway]:
    """The scripted gateway on a port of its own, and a connection to it."""
    runner = web.AppRunner(scripted.app(), shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        [(host, port)] = _addresses(runner.addresses)
        async with connected(Address(f"http://{host}:{port}", "", idle_timeout_s)) as gateway:
            yield gateway
    finally:
        await runner.cleanup()


def _addresses(found: Iterable[Any]) -> list[tuple[str, int]]:
    return [(host, port) for host, port in found]
