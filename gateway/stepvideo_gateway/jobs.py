"""Jobs in the database. Each method is one transaction; only the gateway that has the lease on a job may end it."""

import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import aliased

from stepvideo_gateway.database import ApiKey, Job
from stepvideo_gateway.errors import Conflict, NotFound, TooMany, Unavailable
from stepvideo_gateway.events import deliveries
from stepvideo_gateway.fields import Asked
from stepvideo_gateway.transactions import Transactions, away

QUEUED: Final = "queued"
IN_PROGRESS: Final = "in_progress"
COMPLETED: Final = "completed"
FAILED: Final = "failed"
ACTIVE: Final = (QUEUED, IN_PROGRESS)
DAY_S: Final = 86_400.0

Admit = Callable[[AsyncSession], Awaitable[None]]


def new_id() -> str:
    """The id of a new job, which cannot be guessed."""
    return f"video_{secrets.token_hex(16)}"


@dataclass(frozen=True)
class Page:
    """Some of an owner's jobs, and whether there are more."""

    jobs: Sequence[Job]
    has_more: bool


class Jobs:
    """All jobs. `gateway`: the name of this process in leases; `clock`: unix seconds; `webhooks`: told of ends.

    Every method raises Unavailable while the database is away.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        lease_s: float,
        keep_days: float,
        clock: Callable[[], float] = time.time,
        webhooks: Sequence[str] = (),
    ) -> None:
        self.gateway = secrets.token_hex(8)
        self._lease_s, self._keep_days, self._clock, self._webhooks = lease_s, keep_days, clock, webhooks
        self._engine, self._transaction = engine, Transactions(engine)

    async def create(self, job: Job, max_queued: int, admit: Admit | None = None) -> Job:
        """Adds a job; the one that came before with the same idempotency key, if there is one.

        Raises Conflict where that one asked for something else, TooMany when so many wait already, and what `admit`
        raises, which sees the transaction.
        """
        try:
            async with self._transaction() as session:
                if job.idempotency_key is not None and (before := await self._by_key(session, job)) is not None:
                    return before
                waiting = await session.scalar(sa.select(sa.func.count()).where(Job.status == QUEUED, ~Job.cancelled))
                if (waiting or 0) >= max_queued:
                    raise TooMany(f"At most {max_queued} jobs may wait, {waiting} do: try again later.", None, 30)
                if admit is not None:
                    await admit(session)
                session.add(job)
            return job
        except Unavailable as error:
            if not isinstance(error.__cause__, IntegrityError):
                raise
        async with self._transaction() as session:  # another gateway was faster with the same key
            before = await self._by_key(session, job)
        if before is None:
            raise Unavailable("The job could not be kept: send the request again.")
        return before

    async def get(self, job_id: str, owner: str) -> Job:
        """An owner's job. Raises NotFound."""
        async with self._transaction.reading() as session:
            job = await session.get(Job, job_id)
        if job is None or job.owner != owner or job.cancelled:
            raise NotFound(f"There is no video {job_id[:80]!r}.", "video_id")
        return job

    async def page(self, owner: str, after: str | None, limit: int, newest_first: bool) -> Page:
        """An owner's jobs in the order of their creation, from behind the job `after`. Raises NotFound for that."""
        key = sa.tuple_(Job.created_at, Job.id)
        query = sa.select(Job).where(Job.owner == owner, ~Job.cancelled)
        if after is not None:
            last = await self.get(after, owner)
            place = sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
            query = query.where(key < place if newest_first else key > place)
        order = (Job.created_at.desc(), Job.id.desc()) if newest_first else (Job.created_at, Job.id)
        async with self._transaction.reading() as session:
            found = (await session.scalars(query.order_by(*order).limit(limit + 1))).all()
        return Page(found[:limit], len(found) > limit)

    async def claim(self, server: str, urgent_only: bool = False) -> Job | None:
        """The next job for a server, with a lease on it: first those that a gateway has left in the middle there, then
        the most urgent, then the oldest. `urgent_only`: only one more urgent than all that the server has."""
        now = self._clock()
        free = sa.or_(Job.lease_until.is_(None), Job.lease_until < now)
        mine = sa.or_(Job.server.is_(None), Job.server == server)
        may = sa.or_(Job.server.is_not(None), Job.owner.not_in(_at_their_limits()))
        query = sa.select(Job).where(Job.status.in_(ACTIVE), ~Job.cancelled, free, mine, may, Job.not_before <= now)
        if urgent_only:
            theirs = sa.select(sa.func.min(Job.urgency)).where(
                Job.server == server, Job.status.in_(ACTIVE), Job.lease_until >= now
            )
            query = query.where(Job.urgency < theirs.scalar_subquery())
        order = (Job.server.is_(None), Job.urgency, Job.created_at, Job.id)
        async with self._transaction() as session:
            job = await session.scalar(query.order_by(*order).limit(1).with_for_update(skip_locked=True))
            if job is None or (job.server is None and await self._is_at_limit(session, job.owner)):
                return None
            job.server, job.lease, job.lease_until = server, self.gateway, now + self._lease_s
            return job

    async def renew(self, job_ids: Sequence[str]) -> tuple[set[str], set[str]]:
        """Prolongs this gateway's leases; the ids that are still its own, and those of them whose callers have deleted
        them meanwhile."""
        if not job_ids:
            return set(), set()
        async with self._transaction() as session:
            jobs = (await session.scalars(sa.select(Job).where(Job.id.in_(job_ids), Job.lease == self.gateway))).all()
            for job in jobs:
                job.lease_until = self._clock() + self._lease_s
            return {job.id for job in jobs}, {job.id for job in jobs if job.cancelled}

    async def move_away(self, servers: Sequence[str]) -> int:
        """Jobs that belong to a server outside `servers`, and that no gateway follows, may go to any server from now
        on. Returns their number."""
        lost = sa.and_(Job.server.is_not(None), Job.server.not_in(servers), Job.status.in_(ACTIVE))
        free = sa.or_(Job.lease_until.is_(None), Job.lease_until < self._clock(), Job.lease == self.gateway)
        values = {"server": None, "status": QUEUED, "lease": None, "lease_until": None}
        async with self._transaction() as session:
            result = await session.execute(sa.update(Job).where(lost, free).values(**values))
            return int(getattr(result, "rowcount", 0))

    async def progress(self, job_id: str, **values: Any) -> None:
        """Writes how far the run is; the names of `values` are columns."""
        await self._change(job_id, **values)

    async def complete(self, job_id: str, seed: int, report: dict[str, Any], video_bytes: int) -> None:
        """Ends the job: its video is in the store."""
        await self._end(job_id, status=COMPLETED, seed=seed, report=report, video_bytes=video_bytes)

    async def fail(self, job_id: str, code: str, message: str) -> None:
        """Ends the job: it will have no video."""
        await self._end(job_id, status=FAILED, error_code=code, error_message=message)

    async def put_back(self, job_id: str, wait_s: float, elsewhere: bool, attempts: int) -> None:
        """Gives the lease up: some gateway is to go on with the job after `wait_s`, on any server (`elsewhere`), or on
        the one that has its run. `attempts`: that have failed so far."""
        server = {"server": None, "status": QUEUED} if elsewhere else {}
        not_before = self._clock() + wait_s
        await self._change(job_id, lease=None, lease_until=None, not_before=not_before, attempts=attempts, **server)

    async def cancel(self, job_id: str, owner: str) -> Job:
        """Marks an owner's job as deleted; the gateway that has the lease ends the run. Raises NotFound."""
        job = await self.get(job_id, owner)
        async with self._transaction() as session:
            await session.execute(sa.update(Job).where(Job.id == job_id).values(cancelled=True))
        return job

    async def remove(self, job_id: str) -> None:
        """Removes the row."""
        async with self._transaction() as session:
            await session.execute(sa.delete(Job).where(Job.id == job_id))

    async def leave_no_trace(self) -> bool:
        """Moves SQLite's log, which still has removed rows, into the file; returns whether that could be done."""
        if self._engine.dialect.name != "sqlite":
            return True
        try:
            async with self._engine.connect() as connection:
                done = await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
                return done.scalar() == 0
        except (SQLAlchemyError, OSError) as error:
            raise away(error) from error

    async def deleted(self) -> list[Job]:
        """Jobs that were deleted, and on which no gateway has a lease."""
        now = self._clock()
        free = sa.or_(Job.lease_until.is_(None), Job.lease_until < now, Job.lease == self.gateway)
        async with self._transaction.reading() as session:
            return list((await session.scalars(sa.select(Job).where(Job.cancelled, free).limit(100))).all())

    async def expired(self, max_bytes: float) -> list[str]:
        """Ids of jobs that ended too long ago, then of the oldest whose videos are beyond `max_bytes` (0: any)."""
        now = self._clock()
        ended = sa.select(Job.id, Job.video_bytes).where(Job.status.not_in(ACTIVE)).order_by(Job.completed_at.desc())
        async with self._transaction.reading() as session:
            old = list(await session.scalars(sa.select(Job.id).where(Job.expires_at <= now)))
            if not max_bytes:
                return old
            total, going = 0, set(old)
            for job_id, video_bytes in (await session.execute(ended)).all():
                total += video_bytes
                if total > max_bytes and job_id not in going:
                    old.append(job_id)
            return old

    async def counts(self) -> dict[str, int]:
        """How many jobs have each status."""
        query = sa.select(Job.status, sa.func.count()).where(~Job.cancelled).group_by(Job.status)
        async with self._transaction.reading() as session:
            return {row[0]: row[1] for row in (await session.execute(query)).all()}

    async def unclaimed(self) -> int:
        """How many jobs no server has been given yet."""
        query = sa.select(sa.func.count()).where(Job.status == QUEUED, Job.server.is_(None), ~Job.cancelled)
        async with self._transaction.reading() as session:
            return int(await session.scalar(query) or 0)

    async def known(self, job_ids: Sequence[str]) -> set[str]:
        """Those of the ids that jobs have."""
        async with self._transaction.reading() as session:
            return set(await session.scalars(sa.select(Job.id).where(Job.id.in_(job_ids))))

    async def _end(self, job_id: str, **values: Any) -> None:
        now = self._clock()
        expires_at = now + self._keep_days * DAY_S if self._keep_days else None
        values |= {"completed_at": now, "expires_at": expires_at, "lease": None, "lease_until": None}
        async with self._transaction() as session:
            ours = sa.update(Job).where(Job.id == job_id, Job.lease == self.gateway)
            if getattr(await session.execute(ours.values(**values)), "rowcount", 0):
                session.add_all(deliveries(job_id, values["status"], self._webhooks, now))

    async def _change(self, job_id: str, **values: Any) -> None:
        """Changes a job on which this gateway has the lease; does nothing to any other."""
        async with self._transaction() as session:
            await session.execute(sa.update(Job).where(Job.id == job_id, Job.lease == self.gateway).values(**values))

    async def _is_at_limit(self, session: AsyncSession, owner: str) -> bool:
        """Counts again, once claims of other gateways for the same owner have ended: a query does not see claims that
        are under way."""
        if self._engine.dialect.name == "sqlite":
            return False
        await session.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(owner))))
        return owner in (await session.scalars(_at_their_limits())).all()

    async def _by_key(self, session: AsyncSession, job: Job) -> Job | None:
        query = sa.select(Job).where(Job.owner == job.owner, Job.idempotency_key == job.idempotency_key)
        before = await session.scalar(query)
        if before is not None and before.fingerprint != job.fingerprint:
            raise Conflict("The Idempotency-Key came before with another request: choose a new one.")
        return before


def _at_their_limits() -> sa.Select[str]:
    """Owners whose keys allow no more jobs at servers than there are."""
    theirs = aliased(Job)
    at_servers = (theirs.server.is_not(None), theirs.status.in_(ACTIVE), ApiKey.max_running > 0)
    owners = sa.select(theirs.owner).join(ApiKey, ApiKey.name == theirs.owner).where(*at_servers)
    return owners.group_by(theirs.owner, ApiKey.max_running).having(sa.func.count() >= ApiKey.max_running)


def job_of(asked: Asked, job_id: str, owner: str, model: str, key: str | None, now: float) -> Job:
    """The row of a new job."""
    return Job(
        id=job_id,
        owner=owner,
        status=QUEUED,
        created_at=now,
        model=model,
        prompt=asked.prompt,
        options=asked.options,
        urgency=asked.urgency,
        idempotency_key=key,
        fingerprint=asked.fingerprint,
    )
