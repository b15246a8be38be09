"""One worker per server: it claims jobs while the server has room, follows their runs, and keeps their leases.

A run has its job's id as REQUEST_ID, and KEEP_S: a gateway that comes back, or another one, finds it. A server that
does not answer for `LOST_S` has lost its runs; its jobs then go to any server.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Final

from stepvideo_client import (
    AsyncClient,
    ClientError,
    InvalidInput,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    Result,
    ServiceUnavailable,
    StepEvent,
    StreamStalled,
)
from stepvideo_gateway import media, previews
from stepvideo_gateway.config import GatewayConfig
from stepvideo_gateway.database import Job
from stepvideo_gateway.errors import Unavailable
from stepvideo_gateway.fields import settings_of
from stepvideo_gateway.jobs import IN_PROGRESS, QUEUED, Jobs
from stepvideo_gateway.logs import told
from stepvideo_gateway.store import INPUT, VIDEO, Store

LOOK_S: Final = 0.5  # between two looks for work
LOST_S: Final = 15.0
PROGRESS_S: Final = 1.0  # between two writes of a job's progress
FULL_WAIT_S: Final = 2.0
FORGOTTEN_S: Final = 86_400.0  # age at which a picture without a job is removed
RETRY_S: Final = 2.0  # pause after a first failure; doubled with each further one

_logger = logging.getLogger(__name__)


class Worker:
    """Feeds one server. `run` until cancelled; then the leases are given up, and runs go on at the server."""

    def __init__(self, url: str, config: GatewayConfig, jobs: Jobs, store: Store) -> None:
        self.url, self._config, self._jobs, self._store = url, config, jobs, store
        self.wake = asyncio.Event()
        self.ready = False
        self._noted: bool | None = None
        self.ready_at_s = time.monotonic()
        self._client: AsyncClient | None = None
        self._runs: dict[str, asyncio.Task[None]] = {}

    @property
    def client(self) -> AsyncClient:
        """The connection, made in the running loop."""
        if self._client is None:
            servers = self._config.servers
            self._client = AsyncClient(self.url, idle_timeout_s=servers.idle_timeout_s, **servers.security)
        return self._client

    @property
    def lost(self) -> bool:
        """Whether the server has not answered for LOST_S, so that its runs are gone."""
        return not self.ready and time.monotonic() - self.ready_at_s > LOST_S

    @property
    def running(self) -> int:
        """How many jobs this gateway follows on the server."""
        return len(self._runs)

    async def run(self) -> None:
        """Claims and follows jobs."""
        keeper = asyncio.create_task(self._keep_leases(), name=f"leases of {self.url}")
        try:
            while True:
                await self._look()
                self.wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), LOOK_S)
        finally:
            keeper.cancel()
            runs = list(self._runs.values())
            for task in runs:
                task.cancel()
            await asyncio.gather(keeper, *runs, return_exceptions=True)
            if self._client is not None:
                await self._client.close()

    async def _look(self) -> None:
        try:
            self._note(await self.client.why_not_ready())
            if not self.ready:
                return
            self.ready_at_s = time.monotonic()
            while (job := await self._next()) is not None:
                task = asyncio.create_task(self._follow(job), name=job.id)
                self._runs[job.id] = task
                task.add_done_callback(lambda _task, job_id=job.id: self._ended(job_id))  # type: ignore[misc]
        except Unavailable as error:
            _logger.warning("database_away: %s", error)

    def _note(self, reason: str | None) -> None:
        """Notes whether the server is ready (None), or the reason why not, and logs a change."""
        self.ready = reason is None
        if self.ready is not self._noted:
            self._noted = self.ready
            level, event = (logging.INFO, "server_ready") if self.ready else (logging.WARNING, "server_away")
            _logger.log(level, "%s: %s%s", event, self.url, "" if reason is None else f": {reason}")

    async def _next(self) -> Job | None:
        full = len(self._runs) > self._config.servers.waiting
        job = await self._jobs.claim(self.url, urgent_only=full)
        return None if job is None or job.id in self._runs else job

    def _ended(self, job_id: str) -> None:
        self._runs.pop(job_id, None)
        self.wake.set()

    async def _follow(self, job: Job) -> None:
        """Follows a claimed job to its end, or gives its lease up."""
        try:
            image = await asyncio.to_thread(self._store.read, job.id, INPUT)
            if image is None:
                await self._jobs.fail(job.id, "input_lost", "The picture of this job is not in the store any more.")
                return
            result = await self._result(job, image)
            video = await asyncio.to_thread(self._finished, job, result)
            await self._jobs.complete(job.id, result.seed, result.report, len(video))
            _logger.info("job_completed: %s", told(job))
        except asyncio.CancelledError:  # this gateway stops, or the job was deleted
            with contextlib.suppress(Unavailable):
                await self._jobs.put_back(job.id, 0.0, elsewhere=False, attempts=job.attempts)
            raise
        except Unavailable as error:  # disk full, database away: the server keeps the result
            _logger.warning("job_waits: %s: %s", told(job), error)
            await self._try_later(job, RETRY_S, elsewhere=False, attempts=job.attempts)
        except ClientError as error:
            await self._failed(job, error)
        except Exception:  # a fault of the gateway; logged whole, and it counts as an attempt
            _logger.exception("fault: %s", told(job))
            await self._failed(job, StreamStalled("The gateway failed: see its log."))

    async def _result(self, job: Job, image: bytes) -> Result:
        options = {**job.options, "priority": job.urgency, "output": "mp4"}
        keep_s = self._config.servers.keep_s
        _logger.info("job_sent: %s to %s", told(job), self.url)
        events = self.client.generate(
            image, job.prompt, traceparent=job.traceparent, request_id=job.id, keep_s=keep_s, **options
        )
        written_s = seen_s = -PROGRESS_S
        try:
            async for event in events:
                if isinstance(event, Result):
                    return event
                if time.monotonic() - written_s >= PROGRESS_S:
                    await self._progress(job.id, event)
                    written_s = time.monotonic()
                if event.preview is not None and time.monotonic() - seen_s >= PROGRESS_S:
                    await previews.keep(self._store, job.id, event)
                    seen_s = time.monotonic()
        finally:
            previews.forget(self._store, job.id)
        raise ServiceUnavailable("The server ended the run without a result.")

    def _finished(self, job: Job, result: Result) -> bytes:
        """Writes the mp4 as it is handed out into the store, and returns it. Blocks."""
        video = result.video or b""
        if self._config.videos.mark:
            settings = {"prompt": job.prompt, **settings_of(job.options), "seed": result.seed, "model": job.model}
            video = media.marked(video, settings)
        self._store.write(job.id, VIDEO, video)
        return video

    async def _progress(self, job_id: str, event: StepEvent) -> None:
        with contextlib.suppress(Unavailable):  # the next step is written instead
            await self._jobs.progress(
                job_id,
                status=QUEUED if event.queue_position is not None and event.step == 0 else IN_PROGRESS,
                step=event.step,
                total_steps=event.total_steps,
                queue_position=event.queue_position,
                start_in_s=event.start_in_s,
                elapsed_s=event.elapsed_s,
            )

    async def _failed(self, job: Job, error: ClientError) -> None:
        """Decides what follows when the server failed the job, or could not be reached."""
        attempts = job.attempts + 1
        _logger.warning("attempt_failed: %s: %s: %s", told(job), error.code, error)
        if isinstance(error, QueueFull):  # does not count as an attempt: no run was begun
            await self._try_later(job, FULL_WAIT_S, elsewhere=True, attempts=job.attempts)
        elif isinstance(error, InvalidRequest | InvalidInput):
            await self._jobs.fail(job.id, "invalid_request", str(error))
        elif isinstance(error, RequestCancelled):
            await self._jobs.fail(job.id, "cancelled", "The run was cancelled.")
        elif attempts >= self._config.servers.attempts:
            await self._jobs.fail(job.id, "server_error", f"{attempts} attempts failed, the last one so: {error}")
        else:
            refused = isinstance(error, ServiceUnavailable)  # no server runs the job; after other errors one may
            await self._try_later(job, RETRY_S * 2**job.attempts, elsewhere=refused, attempts=attempts)

    async def _try_later(self, job: Job, wait_s: float, elsewhere: bool, attempts: int) -> None:
        try:
            await self._jobs.put_back(job.id, wait_s, elsewhere, attempts)
        except Unavailable:  # then the lease runs out
            _logger.warning("job_waits: %s: the database is away", told(job))

    async def _keep_leases(self) -> None:
        """Renews the leases; ends runs of jobs that were deleted, and leaves jobs that another gateway has taken."""
        while True:
            await asyncio.sleep(min(1.0, self._config.jobs.lease_s / 4))
            followed = list(self._runs)
            try:
                ours, deleted = await self._jobs.renew(followed)
            except Unavailable:
                continue
            for job_id in followed:
                if job_id in deleted:
                    await self.end(job_id)
                elif job_id not in ours and (task := self._runs.get(job_id)) is not None:
                    task.cancel()

    async def end(self, job_id: str) -> None:
        """Ends the run of a job on the server, and stops following it."""
        with contextlib.suppress(ClientError):  # a server that is away has no run to cancel
            await self.client.cancel(job_id)
        if (task := self._runs.get(job_id)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Dispatcher:
    """All workers, and the work from time to time: jobs of lost servers go to others, deleted and expired jobs go."""

    def __init__(
        self, config: GatewayConfig, jobs: Jobs, store: Store, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._jobs, self._store, self._clock = config, jobs, store, clock
        self._traces = True  # of removed jobs, in the database's log
        self.workers = [Worker(url, config, jobs, store) for url in config.servers.urls]

    def wake(self) -> None:
        """Wakes the workers: there is a new job."""
        for worker in self.workers:
            worker.wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for worker in self.workers:
                group.create_task(worker.run(), name=f"worker of {worker.url}")
            group.create_task(self._tidy(), name="tidying")

    async def _tidy(self) -> None:
        swept_s = -60.0
        while True:
            try:
                usable = [worker.url for worker in self.workers if not worker.lost]
                if moved := await self._jobs.move_away(usable):
                    _logger.warning("jobs_moved: %d jobs of servers that are lost wait for another one", moved)
                await self._erase_deleted()
                if self._clock() - swept_s >= 60.0:
                    swept_s = self._clock()
                    for job_id in await self._jobs.expired(self._config.jobs.max_gib * 2**30):
                        await self._erase(job_id)
                    await self._erase_forgotten()
                if self._traces:
                    self._traces = not await self._jobs.leave_no_trace()
            except Unavailable as error:
                _logger.warning("database_away: %s", error)
            await asyncio.sleep(1.0)

    async def _erase_deleted(self) -> None:
        for job in await self._jobs.deleted():
            for worker in self.workers:
                if worker.url == job.server:
                    await worker.end(job.id)
            await self._erase(job.id)

    async def _erase_forgotten(self) -> None:
        """Removes pictures without a job: their gateway was killed, or the database refused the job."""
        found = await asyncio.to_thread(self._store.forgotten, time.time() - FORGOTTEN_S)
        for job_id in set(found) - await self._jobs.known(found):
            await self._erase(job_id)

    async def _erase(self, job_id: str) -> None:
        """Removes files, then the row: where a file cannot be removed the row stays, and a gateway tries again."""
        try:
            await asyncio.to_thread(self._store.remove, job_id)
        except Unavailable as error:
            _logger.warning("job_not_erased: %s: %s", job_id, error)
            return
        await self._jobs.remove(job_id)
        self._traces = True
        _logger.info("job_erased: %s", job_id)
