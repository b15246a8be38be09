"""The HTTP application: /v1/videos as OpenAI's clients know it, its events, and the gateway's own health."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from stepvideo_gateway import __version__, media
from stepvideo_gateway.body import fields_of
from stepvideo_gateway.config import GatewayConfig
from stepvideo_gateway.database import ApiKey, Job
from stepvideo_gateway.errors import ApiError, BadRequest, Unavailable
from stepvideo_gateway.fields import FIELDS, REFERENCE, Asked
from stepvideo_gateway.jobs import COMPLETED, FAILED
from stepvideo_gateway.logs import told
from stepvideo_gateway.metrics import Metrics
from stepvideo_gateway.openapi import DELETED, EVENTS, QUOTE, VIDEO, answers, body
from stepvideo_gateway.pages import Example, Pages
from stepvideo_gateway.progress import progress_of
from stepvideo_gateway.service import Gateway, owner_of
from stepvideo_gateway.store import INPUT
from stepvideo_gateway.video_object import listed, poll_after_ms, video_object

MAX_KEY_CHARACTERS = 255
MAX_PAGE = 100
CREATED = ("prompt", REFERENCE)
REMIXED = ("prompt", "camera")

_logger = logging.getLogger(__name__)
_audit = logging.getLogger("stepvideo_gateway.audit")


def create_app(config: GatewayConfig, example: Example | None = None) -> FastAPI:
    """The application; it works on its jobs while it is served. `example`: what the form of its page begins with."""
    gateway = Gateway(config)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app = FastAPI(title="stepvideo gateway", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.gateway = gateway
    metrics = Metrics(gateway)

    @app.middleware("http")
    async def counted(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        began_s = time.perf_counter()
        response = await answer(request)
        route = request.scope.get("route")
        metrics.note(
            request.method, getattr(route, "path", "none"), response.status_code, time.perf_counter() - began_s
        )
        return response

    @app.get("/metrics", summary="For Prometheus")
    async def exported() -> Response:
        return Response(await metrics.text(), media_type="text/plain; version=0.0.4")

    _add_errors(app)
    _add_videos(app, gateway)
    Pages(example).add_to(app, gateway)
    _add_about(app, gateway)
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
    made = answers(VIDEO)

    @app.post("/v1/videos", summary="Make a video", openapi_extra=body(CREATED), responses=made)
    async def create(request: Request) -> Response:
        key, again = await _holder(gateway, request), _again(request)
        asked = await gateway.asked(await fields_of(request, gateway.config.api))
        job = await gateway.create(asked, key, _trace(request), again)
        return _shown(_noted(gateway, "create", request, key, job))

    @app.get("/v1/videos", summary="List videos", responses=answers(listed([VIDEO], False)))
    async def page(request: Request, after: str | None = None, limit: str = "20", order: str = "desc") -> Response:
        owner = owner_of(await _holder(gateway, request))
        if not (limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= MAX_PAGE):
            raise BadRequest(f"limit must be from 1 to {MAX_PAGE}, got {limit[:20]!r}.", "limit")
        if order not in ("asc", "desc"):
            raise BadRequest(f"order must be asc or desc, got {order[:20]!r}.", "order")
        found = await gateway.jobs.page(owner, after, int(limit), order == "desc")
        return JSONResponse(listed([video_object(job) for job in found.jobs], found.has_more))

    @app.get("/v1/videos/{video_id}", summary="How far a video is", responses=made)
    async def retrieve(video_id: str, request: Request) -> Response:
        return _shown(await gateway.jobs.get(video_id, owner_of(await _holder(gateway, request))))

    @app.delete("/v1/videos/{video_id}", summary="End the run and remove everything of it", responses=answers(DELETED))
    async def delete(video_id: str, request: Request) -> Response:
        key = await _holder(gateway, request)
        job = await gateway.jobs.get(video_id, owner_of(key))
        await gateway.delete(video_id, owner_of(key))
        _noted(gateway, "delete", request, key, job)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    _add_content(app, gateway)
    _add_follow_ups(app, gateway)


def _add_content(app: FastAPI, gateway: Gateway) -> None:
    files: dict[int | str, dict[str, Any]] = {200: {"content": {"video/mp4": {}, "image/webp": {}}}}

    @app.get("/v1/videos/{video_id}/content", summary="The video, its thumbnail or its spritesheet", responses=files)
    async def content(video_id: str, request: Request, variant: str = "video") -> Response:
        job = await gateway.jobs.get(video_id, owner_of(await _holder(gateway, request)))
        path, kind = await gateway.made(job, variant)
        found = await asyncio.to_thread(path.stat)
        file = FileResponse(path, media_type=kind, filename=f"{job.id}{path.suffix}", stat_result=found)
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if file.headers["etag"] in known or known == ["*"]:
            return Response(status_code=304, headers={"etag": file.headers["etag"]})
        return file

    shown = answers(EVENTS, "text/event-stream")

    @app.get("/v1/videos/{video_id}/events", summary="Progress as server-sent events", responses=shown)
    async def events(video_id: str, request: Request) -> Response:
        job = await gateway.jobs.get(video_id, owner_of(await _holder(gateway, request)))
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(progress_of(gateway, job), media_type="text/event-stream", headers=headers)


def _add_follow_ups(app: FastAPI, gateway: Gateway) -> None:
    prompt_only = body(("prompt",), tuple(name for name in FIELDS if name not in REMIXED), multipart=False)
    made = answers(VIDEO)

    @app.post(
        "/v1/videos/{video_id}/remix",
        summary="The same picture and settings, another prompt",
        openapi_extra=prompt_only,
        responses=made,
    )
    async def remix(video_id: str, request: Request) -> Response:
        key, again = await _holder(gateway, request), _again(request)
        before = await gateway.jobs.get(video_id, owner_of(key))
        given = await fields_of(request, gateway.config.api)
        for name in given.keys() - REMIXED:
            raise BadRequest(
                f"A remix has the settings of its video and takes {' and '.join(REMIXED)}, got {name!r}.", name
            )
        picture = await asyncio.to_thread(gateway.store.read, before.id, INPUT)
        new = await gateway.asked({**given, REFERENCE: picture, **_sizes(before)})
        options = {**before.options, "seed": before.seed} if before.seed is not None else before.options
        made = Asked(new.prompt, new.image, dict(options), before.urgency)
        job = await gateway.create(made, key, _trace(request), again, remixed=before.id)
        return _shown(_noted(gateway, "remix", request, key, job))

    @app.post(
        "/v1/videos/{video_id}/extension",
        summary="A clip that begins with the last frame of this one",
        openapi_extra=body(("prompt",), (REFERENCE,), multipart=False),
        responses=made,
    )
    async def extension(video_id: str, request: Request) -> Response:
        key, again = await _holder(gateway, request), _again(request)
        before = await gateway.jobs.get(video_id, owner_of(key))
        path, _ = await gateway.made(before, "video")
        given = await fields_of(request, gateway.config.api)
        picture = await asyncio.to_thread(media.last_frame, path)
        sizes = {name: value for name, value in _sizes(before).items() if name not in given}
        if "seconds" in given:
            sizes.pop("num_frames", None)
        asked = await gateway.asked({**sizes, **given, REFERENCE: picture})
        job = await gateway.create(asked, key, _trace(request), again)
        return _shown(_noted(gateway, "extension", request, key, job))


def _add_about(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models", summary="The one model")
    async def models(request: Request) -> Response:
        await _holder(gateway, request)
        model = {"id": gateway.config.api.model, "object": "model", "created": 0, "owned_by": "stepfun-ai"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.post(
        "/v1/quotes",
        summary="What a video would take, as POST /v1/videos asks for it",
        openapi_extra=body(CREATED),
        responses=answers(QUOTE),
    )
    async def quote(request: Request) -> Response:
        await _holder(gateway, request)
        return JSONResponse(await gateway.quote(await gateway.asked(await fields_of(request, gateway.config.api))))


def _add_health(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health", summary="Whether database, folder and servers work")
    async def health() -> Response:
        found: dict[str, Any] = {}
        for name, check in gateway.checks.items():
            try:
                found |= await check()
            except Unavailable as error:
                found[name] = str(error)
        well = gateway.working and not found.keys() & gateway.checks.keys()
        servers = {worker.url: worker.ready for worker in gateway.dispatcher.workers}
        return JSONResponse({"well": well, **found, "servers": servers}, 200 if well else Unavailable.status)


async def _holder(gateway: Gateway, request: Request) -> ApiKey | None:
    return await gateway.holder(request.headers.get("authorization"))


def _again(request: Request) -> str | None:
    """The Idempotency-Key. Raises BadRequest."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY_CHARACTERS:
        raise BadRequest(f"Idempotency-Key must have 1 to {MAX_KEY_CHARACTERS} characters, got {len(key)}.")
    return key


def _trace(request: Request) -> list[str]:
    return request.headers.getlist("traceparent")


def _noted(gateway: Gateway, action: str, request: Request, key: ApiKey | None, job: Job) -> Job:
    """The job, once the audit log has a line about it."""
    caller = request.client.host if request.client is not None else "?"
    prompt = f" prompt={json.dumps(job.prompt)}" if gateway.config.api.log_prompts else ""
    _audit.info("%s job=%s key=%s from=%s%s", action, told(job), json.dumps(owner_of(key)), caller, prompt)
    return job


def _shown(job: Job) -> Response:
    headers = {"openai-poll-after-ms": str(poll_after_ms(job))} if job.status not in (COMPLETED, FAILED) else {}
    return JSONResponse(video_object(job), headers=headers)


def _sizes(job: Job) -> dict[str, Any]:
    return {"size": f"{job.options['width']}x{job.options['height']}", "num_frames": job.options["num_frames"]}
