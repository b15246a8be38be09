"""What the routes share: jobs, store, workers and keys of one gateway process."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy.ext.asyncio import AsyncSession

from stepvideo_client import ClientError
from stepvideo_gateway import media
from stepvideo_gateway.config import GatewayConfig
from stepvideo_gateway.database import ApiKey, Job, engine_for, migrate
from stepvideo_gateway.dispatch import Dispatcher
from stepvideo_gateway.errors import ApiError, BadRequest, NotReady, Unavailable
from stepvideo_gateway.fields import REFERENCE, Asked, asked, is_address, param_of, picture_kind
from stepvideo_gateway.jobs import COMPLETED, FAILED, Jobs, job_of, new_id
from stepvideo_gateway.keys import Keys, check_counts, check_request
from stepvideo_gateway.outbound import NotAllowed, ask, target_of
from stepvideo_gateway.store import INPUT, LAST_FRAME, SPRITESHEET, THUMBNAIL, VIDEO, Store
from stepvideo_gateway.traces import traceparent_of
from stepvideo_gateway.webhooks import Postman

ERASED_S = 5.0  # how long a deletion waits for its run to end
QUOTED = ("num_frames", "height", "width", "steps", "cfg_scale", "time_shift", "quality")
VARIANTS: dict[str, tuple[str, str, Callable[..., bytes] | None]] = {
    "video": (VIDEO, "video/mp4", None),
    "thumbnail": (THUMBNAIL, "image/webp", media.thumbnail),
    "spritesheet": (SPRITESHEET, "image/webp", media.spritesheet),
    "last_frame": (LAST_FRAME, "image/png", media.last_frame),
}

_logger = logging.getLogger(__name__)


class Gateway:
    """What the routes share; alive between startup and shutdown of the application."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.engine = engine_for(config.jobs.database)
        self.jobs = Jobs(self.engine, config.jobs.lease_s, config.jobs.keep_days, webhooks=config.webhooks.urls)
        self.keys = Keys(self.engine)
        self.postman = Postman(self.engine, config.webhooks)
        self.store = Store(config.jobs.folder)
        self.dispatcher = Dispatcher(config, self.jobs, self.store)
        self._defaults: dict[str, Any] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the block runs, tables and folder exist and workers run."""
        self.store.prepare()
        await migrate(self.config.jobs.database)
        works = [asyncio.create_task(part.run(), name=type(part).__name__) for part in (self.dispatcher, self.postman)]
        for work in works:
            work.add_done_callback(_said)
        try:
            yield
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)
            await self.engine.dispose()

    @property
    def working(self) -> bool:
        """Whether some server is ready."""
        return any(worker.ready for worker in self.dispatcher.workers)

    @property
    def checks(self) -> dict[str, Callable[[], Awaitable[dict[str, Any]]]]:
        """What can be away besides servers, and how to find out: each raises Unavailable, or says what health tells."""

        async def database() -> dict[str, Any]:
            return {"jobs": await self.jobs.counts()}

        async def folder() -> dict[str, Any]:
            await asyncio.to_thread(self.store.check)
            return {}

        return {"database": database, "folder": folder}

    async def holder(self, authorization: str | None) -> ApiKey | None:
        """The key that a request came with; None where no keys are asked for. Raises Unauthorized."""
        return await self.keys.holder(authorization) if self.config.api.require_key else None

    async def asked(self, given: dict[str, Any]) -> Asked:
        """The request, once the gateway and a server have checked it. Raises BadRequest and Unavailable."""
        if is_address(given.get(REFERENCE)):
            given = {**given, REFERENCE: await self._fetched(given[REFERENCE])}
        known = bool(given.get("size")) and bool(given.get("num_frames") or given.get("seconds"))
        request = asked(given, self.config.api.model, {} if known else await self._server_defaults())
        await self._let_a_server_look(request)
        return request

    async def create(
        self,
        request: Asked,
        key: ApiKey | None,
        trace: Sequence[str],
        again: str | None = None,
        remixed: str | None = None,
    ) -> Job:
        """Keeps the job and its picture. `trace`: the values of its header traceparent; `again`: its Idempotency-Key.
        Raises ApiError."""
        if key is not None:
            check_request(key, request)
        now = time.time()
        job = job_of(request, new_id(), owner_of(key), self.config.api.model, again, now)
        job.remixed_from = remixed
        job.traceparent = traceparent_of(trace, self.config.traces.sample_ratio)
        await asyncio.to_thread(self.store.write, job.id, INPUT, request.image)
        try:
            admit = None if key is None else partial(_admit, key=key, now=now)
            kept = await self.jobs.create(job, self.config.jobs.max_queued, admit)
        except ApiError:
            await asyncio.to_thread(self.store.remove, job.id)
            raise
        if kept.id != job.id:
            await asyncio.to_thread(self.store.remove, job.id)
        self.dispatcher.wake()
        return kept

    async def quote(self, request: Asked) -> dict[str, Any]:
        """What the request would take on each server, and until when it would wait. Raises BadRequest, Unavailable."""
        options = {name: request.options[name] for name in QUOTED if name in request.options}
        quotes: dict[str, dict[str, Any]] = {}
        for worker in self.dispatcher.workers:
            if worker.ready:
                try:
                    answer = await worker.client.quote(**options, priority=request.urgency)
                except ClientError as error:
                    if error.code == "INVALID_ARGUMENT":
                        raise BadRequest(str(error), param_of(str(error))) from error
                    continue
                quotes[worker.url] = {"seconds": answer.seconds, "wait_s": answer.queue_wait_s, "report": answer.report}
        if not quotes:
            raise Unavailable("No server can tell yet: servers must be ready, and have made a video before.", None, 10)
        waiting = await self.jobs.unclaimed()  # the wait that a server tells includes the jobs that it has
        soonest = min(quotes.values(), key=lambda quote: float(quote["wait_s"]))
        rounds = waiting // len(quotes)
        return {
            "object": "quote",
            "seconds": soonest["seconds"],
            "wait_s": soonest["wait_s"] + rounds * soonest["seconds"],
            "jobs_waiting": waiting,
            "servers": quotes,
        }

    async def quotes(self, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Preset -> the quote of the request with it, or the body of the API's error. The presets are those of the
        first ready server that answers; empty if none does."""
        offer = await self.offer()
        found: dict[str, dict[str, Any]] = {}
        for preset in offer["presets"] if offer else ():
            try:
                found[preset] = await self.quote(await self.asked({**given, "quality": preset}))
            except ApiError as error:
                found[preset] = error.body
        return found

    async def delete(self, job_id: str, owner: str) -> None:
        """Ends the run within a step, and removes all of the job. Raises NotFound."""
        job = await self.jobs.cancel(job_id, owner)
        deadline_s = time.monotonic() + ERASED_S
        while time.monotonic() < deadline_s and await self._is_left(job.id):
            await asyncio.sleep(0.1)

    async def made(self, job: Job, variant: str) -> tuple[Path, str]:
        """Path and media type of a finished job's file; of its picture, whatever became of it. Raises BadRequest,
        NotReady and Unavailable."""
        if variant == INPUT:
            return await asyncio.to_thread(self._picture, job.id)
        if variant not in VARIANTS:
            known = ", ".join((*VARIANTS, INPUT))
            raise BadRequest(f"variant must be one of {known}, got {variant[:40]!r}.", "variant")
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
        return path, kind

    async def offer(self) -> dict[str, Any] | None:
        """What the first ready server that tells accepts: defaults, limits and presets; None while none tells."""
        for worker in (each for each in self.dispatcher.workers if each.ready):
            try:
                return await worker.client.offer()
            except ClientError as error:
                _logger.warning("server_away: %s: %s", worker.url, error)
        return None

    def _picture(self, job_id: str) -> tuple[Path, str]:
        content = self.store.read(job_id, INPUT)
        if content is None:
            raise Unavailable("The picture is not in the store any more: it was removed beside the gateway.")
        return self.store.path(job_id, INPUT), picture_kind(content)

    async def _is_left(self, job_id: str) -> bool:
        return job_id in {job.id for job in await self.jobs.deleted()} or self.store.path(job_id, INPUT).exists()

    async def _fetched(self, address: str) -> bytes:
        """The picture at an http(s) address. Raises BadRequest."""
        if not self.config.api.fetch_references:
            raise BadRequest(f"{REFERENCE} must be a file or a data URL: addresses are not fetched here.", REFERENCE)
        most = self.config.api.max_upload_mib << 20
        try:
            target = await target_of(address, self.config.webhooks.allow_private)
            async with httpx2.AsyncClient() as client:
                status, kind, content = await ask(client, "GET", target, {"accept": "image/*"}, b"", most)
        except (httpx2.HTTPError, NotAllowed, TimeoutError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise BadRequest(f"{REFERENCE} could not be fetched: {reason}.", REFERENCE) from None
        if status != 200 or not kind.startswith("image/"):
            raise BadRequest(f"{REFERENCE} must be the address of a picture, got {status} and {kind!r}.", REFERENCE)
        return content

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
                    await worker.client.quote(**options)
                except ClientError as error:
                    if error.code == "INVALID_ARGUMENT":
                        raise BadRequest(str(error), param_of(str(error))) from error
                return


async def _admit(session: AsyncSession, key: ApiKey, now: float) -> None:
    await check_counts(session, key, now)


def owner_of(key: ApiKey | None) -> str:
    """The owner whose jobs the holder of a key may see."""
    return "" if key is None else key.name


def _said(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        _logger.critical("%s has ended", task.get_name(), exc_info=task.exception())
