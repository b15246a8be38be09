"""The HTTP application: /v1/videos as OpenAI's clients know it, its events, and the gateway's own health."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from stepvideo_client import ClientError
from stepvideo_gateway import __version__, media
from stepvideo_gateway.body import fields_of
from stepvideo_gateway.config import GatewayConfig
from stepvideo_gateway.database import Job, engine_for, migrate
from stepvideo_gateway.dispatch import Dispatcher
from stepvideo_gateway.errors import ApiError, BadRequest, NotReady, Unavailable
from stepvideo_gateway.fields import Asked, asked, param_of
from stepvideo_gateway.jobs import COMPLETED, FAILED, Jobs, job_of, new_id
from stepvideo_gateway.store import INPUT, SPRITESHEET, THUMBNAIL, VIDEO, Store
from stepvideo_gateway.video_object import listed, poll_after_ms, video_object

MAX_KEY_CHARACTERS = 255
MAX_PAGE = 100
EVENT_S = 0.5
ERASED_S = 5.0  # how long a deletion waits for its run to end
QUOTED = ("num_frames", "height", "width", "steps", "cfg_scale", "time_shift", "quality")
VARIANTS: dict[str, tuple[str, str, Callable[..., bytes] | None]] = {
    "video": (VIDEO, "video/mp4", None),
    "thumbnail": (THUMBNAIL, "image/webp", media.thumbnail),
    "spritesheet": (SPRITESHEET, "image/webp", media.spritesheet),
}

_logger = logging.getLogger(__name__)


class Gateway:
    """What the routes share; alive between startup and shutdown of the application."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.engine = engine_for(config.jobs.database)
        self.jobs = Jobs(self.engine, config.jobs.lease_s, config.jobs.keep_days)
        self.store = Store(config.jobs.folder)
        self.dispatcher = Dispatcher(config, self.jobs, self.store)
        self._defaults: dict[str, Any] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Tables and folder are there, workers run."""
        self.store.prepare()
        await migrate(self.config.jobs.database)
        work = asyncio.create_task(self.dispatcher.run(), name="dispatcher")
        work.add_done_callback(_said)
        try:
            yield
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await self.engine.dispose()

    @property
    def working(self) -> bool:
        """Whether some server is ready."""
        return any(worker.ready for worker in self.dispatcher.workers)

    async def asked(self, given: dict[str, Any]) -> Asked:
        """The request, in order as far as the gateway and a server can tell. Raises BadRequest and Unavailable."""
        known = bool(given.get("size")) and bool(given.get("num_frames") or given.get("seconds"))
        request = asked(given, self.config.api.model, {} if known else await self._server_defaults())
        await self._let_a_server_look(request)
        return request

    async def create(self, request: Asked, key: str | None, remixed_from: str | None = None) -> Job:
        """Keeps the job and its picture. Raises ApiError."""
        job = job_of(request, new_id(), "", self.config.api.model, key, time.time())
        job.remixed_from = remixed_from
        await asyncio.to_thread(self.store.write, job.id, INPUT, request.image)
        try:
            kept = await self.jobs.create(job, self.config.jobs.max_queued)
        except ApiError:
            await asyncio.to_thread(self.store.remove, job.id)
            raise
        if kept.id != job.id:
            await asyncio.to_thread(self.store.remove, job.id)
        self.dispatcher.wake()
        return kept

    async def delete(self, job_id: str) -> None:
        """The run ends within a step, and nothing is left of the job. Raises NotFound."""
        job = await self.jobs.cancel(job_id, "")
        deadline_s = time.monotonic() + ERASED_S
        while time.monotonic() < deadline_s and await self._is_left(job.id):
            await asyncio.sleep(0.1)

    async def made(self, job: Job, variant: str) -> tuple[str, str]:
        """Path and media type of a finished job's file. Raises BadRequest and NotReady."""
        if variant not in VARIANTS:
            raise BadRequest(f"variant must be one of {', '.join(VARIANTS)}, got {variant[:40]!r}.", "variant")
        if job.status == FAILED:
            raise NotReady(f"This video failed ({job.error_code}): {job.error_message}", "video_id")
        if job.status != COMPLETED:
            raise NotReady(f"This video is {job.status}: ask for its content when it is completed.", "video_id")
        name, kind, make = VARIANTS[variant]
        path = self.store.path(job.id, name)
        if make is not None and not path.exists():
            content = await asyncio.to_thread(make, self.store.path(job.id, VIDEO))
            await asyncio.to_thread(self.store.write, job.id, name, content)
        if not path.exists():
            raise Unavailable("The video's file is not in the store any more: it was removed beside the gateway.")
        return str(path), kind

    async def _is_left(self, job_id: str) -> bool:
        return job_id in {job.id for job in await self.jobs.deleted()} or self.store.path(job_id, INPUT).exists()

    async def _server_defaults(self) -> dict[str, Any]:
        """num_frames, height and width of the first server that tells; asked once. Raises Unavailable."""
        for worker in self.dispatcher.workers if self._defaults is None else ():
            try:
                self._defaults = await worker.client.defaults()
                break
            except ClientError as error:
                _logger.warning("server_away: %s: %s", worker.url, error)
        if self._defaults is None:
            raise Unavailable("No server tells its defaults yet: give num_frames and size, or try again.", None, 5)
        return self._defaults

    async def _let_a_server_look(self, request: Asked) -> None:
        """Ranges and presets are the server's: what it would refuse is refused now. Without a server, later."""
        options = {name: request.options[name] for name in QUOTED if name in request.options}
        for worker in self.dispatcher.workers:
            if worker.ready:
                try:
                    await worker.client.quote(**options)  # type: ignore[arg-type]
                except ClientError as error:
                    if error.code == "INVALID_ARGUMENT":
                        raise BadRequest(str(error), param_of(str(error))) from error
                return


def create_app(config: GatewayConfig) -> FastAPI:
    """The application; it works on its jobs while it is served."""
    gateway = Gateway(config)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app = FastAPI(title="stepvideo gateway", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.gateway = gateway
    _add_errors(app)
    _add_videos(app, gateway)
    _add_health(app, gateway)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(_request: Request, error: HTTPException) -> Response:
        body = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": "invalid_request"}
        return JSONResponse({"error": body}, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def fault(_request: Request, error: Exception) -> Response:
        _logger.error("fault", exc_info=error)
        return JSONResponse(ApiError("The gateway failed to answer: see its log.").body, ApiError.status)


def _add_videos(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/videos", summary="Make a video", openapi_extra=CREATE_BODY)
    async def create(request: Request) -> Response:
        key = request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= MAX_KEY_CHARACTERS:
            raise BadRequest(f"Idempotency-Key must have 1 to {MAX_KEY_CHARACTERS} characters, got {len(key)}.")
        given = await fields_of(request, gateway.config.api)
        return _shown(await gateway.create(await gateway.asked(given), key))

    @app.get("/v1/videos", summary="List videos")
    async def page(after: str | None = None, limit: str = "20", order: str = "desc") -> Response:
        if not (limit.isdecimal() and 1 <= int(limit) <= MAX_PAGE):
            raise BadRequest(f"limit must be from 1 to {MAX_PAGE}, got {limit[:20]!r}.", "limit")
        if order not in ("asc", "desc"):
            raise BadRequest(f"order must be asc or desc, got {order[:20]!r}.", "order")
        found = await gateway.jobs.page("", after, int(limit), order == "desc")
        return JSONResponse(listed([video_object(job) for job in found.jobs], found.has_more))

    @app.get("/v1/videos/{video_id}", summary="How far a video is")
    async def retrieve(video_id: str) -> Response:
        return _shown(await gateway.jobs.get(video_id, ""))

    @app.delete("/v1/videos/{video_id}", summary="End the run and remove everything of it")
    async def delete(video_id: str) -> Response:
        await gateway.delete(video_id)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    @app.get("/v1/videos/{video_id}/content", summary="The video, its thumbnail or its spritesheet")
    async def content(video_id: str, variant: str = "video") -> Response:
        job = await gateway.jobs.get(video_id, "")
        path, kind = await gateway.made(job, variant)
        return FileResponse(path, media_type=kind, filename=f"{job.id}{path[path.rindex('.') :]}")

    @app.post("/v1/videos/{video_id}/remix", summary="The same picture and settings, another prompt")
    async def remix(video_id: str, request: Request) -> Response:
        before = await gateway.jobs.get(video_id, "")
        given = await fields_of(request, gateway.config.api)
        picture = await asyncio.to_thread(gateway.store.read, before.id, INPUT)
        new = await gateway.asked({**given, "input_reference": picture, **_sizes(before)})
        options = {**before.options, "seed": before.seed} if before.seed is not None else before.options
        made = Asked(new.prompt, new.image, dict(options), before.urgency)
        return _shown(await gateway.create(made, None, remixed_from=before.id))

    @app.post("/v1/videos/{video_id}/extension", summary="A clip that begins with the last frame of this one")
    async def extension(video_id: str, request: Request) -> Response:
        before = await gateway.jobs.get(video_id, "")
        path, _ = await gateway.made(before, "video")
        given = await fields_of(request, gateway.config.api)
        picture = await asyncio.to_thread(media.last_frame, path)
        sizes = {name: value for name, value in _sizes(before).items() if name not in given}
        if "seconds" in given:
            sizes.pop("num_frames", None)
        return _shown(await gateway.create(await gateway.asked({**sizes, **given, "input_reference": picture}), None))

    @app.get("/v1/videos/{video_id}/events", summary="Progress as server-sent events")
    async def events(video_id: str) -> Response:
        job = await gateway.jobs.get(video_id, "")
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(_events(gateway, job), media_type="text/event-stream", headers=headers)


def _add_health(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models", summary="The one model")
    async def models() -> Response:
        model = {"id": gateway.config.api.model, "object": "model", "created": 0, "owned_by": "stepfun-ai"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/health", summary="Whether database, folder and servers work")
    async def health() -> Response:
        servers = {worker.url: worker.ready for worker in gateway.dispatcher.workers}
        try:
            counts = await gateway.jobs.counts()
        except Unavailable as error:
            return JSONResponse({"well": False, "database": str(error), "servers": servers}, Unavailable.status)
        well = gateway.working
        return JSONResponse({"well": well, "jobs": counts, "servers": servers}, 200 if well else Unavailable.status)


async def _events(gateway: Gateway, job: Job) -> AsyncIterator[bytes]:
    """A video object whenever it has changed, until it ends."""
    shown: dict[str, Any] | None = None
    while True:
        now = video_object(job)
        if now != shown:
            shown = now
            name = {COMPLETED: "video.completed", FAILED: "video.failed"}.get(job.status, "video.progress")
            yield f"event: {name}\ndata: {json.dumps(now)}\n\n".encode()
            if job.status in (COMPLETED, FAILED):
                return
        await asyncio.sleep(EVENT_S)
        try:
            job = await gateway.jobs.get(job.id, "")
        except Unavailable:
            continue
        except ApiError:
            yield f"event: video.deleted\ndata: {json.dumps({'id': job.id})}\n\n".encode()
            return


def _shown(job: Job) -> Response:
    headers = {"openai-poll-after-ms": str(poll_after_ms(job))} if job.status not in (COMPLETED, FAILED) else {}
    return JSONResponse(video_object(job), headers=headers)


def _sizes(job: Job) -> dict[str, Any]:
    return {"size": f"{job.options['width']}x{job.options['height']}", "num_frames": job.options["num_frames"]}


def _said(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        _logger.critical("the dispatcher has ended", exc_info=task.exception())


_EXAMPLE = {
    "prompt": "A cat stretches.",
    "size": "992x544",
    "seconds": "4",
    "input_reference": "data:image/png;base64,...",
    "num_inference_steps": 50,
    "guidance_scale": 9,
    "motion_score": 5,
    "quality": "balanced",
}
CREATE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {"type": "object", "required": ["prompt", "input_reference"]}},
            "application/json": {"schema": {"type": "object"}, "example": _EXAMPLE},
        },
    }
}
