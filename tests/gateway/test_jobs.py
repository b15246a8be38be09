"""Jobs in SQLite and in PostgreSQL: claimed by one gateway at a time, and found again."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.ext.asyncio import AsyncEngine

from stepvideo_gateway.config import Webhooks
from stepvideo_gateway.database import Base as Tables
from stepvideo_gateway.database import Delivery, Job, engine_for, migrate, migrations
from stepvideo_gateway.errors import Conflict, NotFound, TooMany, Unavailable
from stepvideo_gateway.fields import Asked
from stepvideo_gateway.jobs import DAY_S, Jobs, job_of, new_id
from stepvideo_gateway.keys import Keys
from stepvideo_gateway.webhooks import KEPT_S, Postman
from tests.gateway.postgres import Postgres, installed, postgres

ASKED = Asked("a cat", b"png", {"num_frames": 17, "height": 64, "width": 96}, 2)
SERVER = "a:8001"


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Base:
    """A database with tables, and gateways on it."""

    url: str
    clock: Clock = field(default_factory=Clock)

    def use(self, test: Callable[..., Awaitable[None]]) -> None:
        """Runs a test with two gateways' views of the jobs."""

        async def run() -> None:
            engines: list[AsyncEngine] = [engine_for(self.url), engine_for(self.url)]
            try:
                await test(*(Jobs(engine, 30.0, 1.0, self.clock) for engine in engines))
            finally:
                for engine in engines:
                    await engine.dispose()

        asyncio.run(run())


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgres]:
    with postgres(installed()) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path / 'new' / 'jobs.sqlite'}"
    else:
        url = request.getfixturevalue("postgresql").url
        from alembic import command

        command.downgrade(migrations(url), "base") if _has_tables(url) else None
    asyncio.run(migrate(url))
    asyncio.run(migrate(url))  # and again: nothing to do
    return Base(url)


def _has_tables(url: str) -> bool:
    async def look() -> bool:
        engine = engine_for(url)
        try:
            async with engine.connect() as connection:
                return await connection.run_sync(lambda sync: engine.dialect.has_table(sync, "jobs"))
        finally:
            await engine.dispose()

    return asyncio.run(look())


def test_the_steps_lead_to_the_tables_of_the_code(base: Base) -> None:
    def differences(connection: sa.Connection) -> list[Any]:
        return list(compare_metadata(MigrationContext.configure(connection), Tables.metadata))

    async def test() -> None:
        engine = engine_for(base.url)
        async with engine.connect() as connection:
            assert await connection.run_sync(differences) == []
        await engine.dispose()

    asyncio.run(test())


def a_job(now_s: float = 1000.0, key: str | None = None, **changes: Any) -> Job:
    job = job_of(ASKED, new_id(), "", "m", key, now_s)
    for name, value in changes.items():
        setattr(job, name, value)
    return job


def test_a_job_is_claimed_once(base: Base) -> None:
    async def test(first: Jobs, second: Jobs) -> None:
        ids = [(await first.create(a_job(1000.0 + number), 100)).id for number in range(8)]
        claims = await asyncio.gather(*(gateway.claim(SERVER) for gateway in (first, second) * 6))
        assert sorted(job.id for job in claims if job is not None) == sorted(ids)

    base.use(test)


def test_the_most_urgent_then_the_oldest_goes_first(base: Base) -> None:
    async def test(jobs: Jobs, _other: Jobs) -> None:
        old = await jobs.create(a_job(1.0), 100)
        low = await jobs.create(a_job(0.0, urgency=3), 100)
        high = await jobs.create(a_job(2.0, urgency=1), 100)
        claimed = [await jobs.claim(SERVER) for _ in range(4)]
        assert [job and job.id for job in claimed] == [high.id, old.id, low.id, None]

    base.use(test)


def test_only_a_more_urgent_one_goes_to_a_full_server(base: Base) -> None:
    async def test(jobs: Jobs, _other: Jobs) -> None:
        await jobs.create(a_job(1.0), 100)
        running = await jobs.claim(SERVER)
        assert running is not None
        await jobs.create(a_job(2.0), 100)
        assert await jobs.claim(SERVER, urgent_only=True) is None
        high = await jobs.create(a_job(3.0, urgency=1), 100)
        claimed = await jobs.claim(SERVER, urgent_only=True)
        assert claimed is not None
        assert claimed.id == high.id

    base.use(test)


def test_a_key_may_have_so_many_jobs_at_servers_and_others_go_first(base: Base) -> None:
    async def test(first: Jobs, second: Jobs) -> None:
        engine = engine_for(base.url)
        await Keys(engine).add("ann", max_running=2)
        await Keys(engine).add("bob")
        await engine.dispose()
        of_ann = [await first.create(a_job(float(number), owner="ann"), 100) for number in range(4)]
        of_bob = [await first.create(a_job(10.0 + number, owner="bob"), 100) for number in range(3)]
        claims: list[Job] = []
        for _ in range(5):  # one of two at the same time may find nothing, and looks again
            claimed = await asyncio.gather(*(jobs.claim(SERVER) for jobs in (first, second) * 4))
            claims += [job for job in claimed if job is not None]
        at_servers = [job.id for job in claims]
        assert len(set(at_servers)) == len(at_servers) == 5
        assert {job.id for job in of_bob} < set(at_servers)
        left = [job.id for job in of_ann if job.id not in at_servers]  # claims at the same time step over each other's
        owner_of_first = first if claims[0].lease == first.gateway else second
        ended = next(job for job in claims if job.owner == "ann")
        await (first if ended.lease == first.gateway else second).complete(ended.id, 7, {}, 10)
        again = await owner_of_first.claim(SERVER)
        assert again is not None
        assert again.id == left[0]
        assert await first.claim(SERVER) is None
        base.clock.now_s += 31.0
        assert await second.claim(SERVER) is not None, "what is at a server goes on"

    base.use(test)


def test_a_lease_that_runs_out_is_taken_over_for_the_same_server(base: Base) -> None:
    async def test(first: Jobs, second: Jobs) -> None:
        job = await first.create(a_job(), 100)
        assert await first.claim(SERVER) is not None
        base.clock.now_s += 20.0
        assert await first.renew([job.id]) == ({job.id}, set())
        base.clock.now_s += 29.0
        assert await second.claim(SERVER) is None
        base.clock.now_s += 2.0
        assert await second.claim("b:8001") is None, "its run is at the other server"
        taken = await second.claim(SERVER)
        assert taken is not None
        assert await first.renew([job.id]) == (set(), set())
        await first.complete(job.id, 7, {}, 10)
        assert (await second.get(job.id, "")).status != "completed", "who has no lease ends nothing"
        await second.complete(job.id, 7, {"seed": 7}, 10)
        ended = await first.get(job.id, "")
        assert (ended.status, ended.seed, ended.report) == ("completed", 7, {"seed": 7})
        assert ended.expires_at == base.clock.now_s + DAY_S

    base.use(test)


def test_jobs_of_a_lost_server_go_to_another_one(base: Base) -> None:
    async def test(first: Jobs, second: Jobs) -> None:
        job = await first.create(a_job(), 100)
        await first.claim(SERVER)
        await first.progress(job.id, status="in_progress", step=3, total_steps=4)
        assert await second.move_away(["b:8001"]) == 0, "a gateway still looks after it"
        base.clock.now_s += 31.0
        assert await second.move_away(["b:8001", SERVER]) == 0
        assert await second.move_away(["b:8001"]) == 1
        moved = await second.claim("b:8001")
        assert moved is not None
        assert moved.status == "queued"

    base.use(test)


def test_what_is_put_back_waits_and_counts_its_attempts(base: Base) -> None:
    async def test(jobs: Jobs, _other: Jobs) -> None:
        job = await jobs.create(a_job(), 100)
        await jobs.claim(SERVER)
        await jobs.put_back(job.id, 5.0, elsewhere=True, attempts=1)
        assert await jobs.claim(SERVER) is None
        base.clock.now_s += 5.0
        again = await jobs.claim("b:8001")
        assert again is not None
        assert again.attempts == 1

    base.use(test)


def test_a_key_belongs_to_one_request(base: Base) -> None:
    async def test(first: Jobs, second: Jobs) -> None:
        made = await asyncio.gather(*(jobs.create(a_job(key="k"), 100) for jobs in (first, second, first, second)))
        assert len({job.id for job in made}) == 1
        with pytest.raises(Conflict):
            await first.create(a_job(key="k", fingerprint="other"), 100)

    base.use(test)


def test_a_full_queue_refuses(base: Base) -> None:
    async def test(jobs: Jobs, _other: Jobs) -> None:
        await jobs.create(a_job(), 1)
        with pytest.raises(TooMany, match="At most 1 jobs may wait, 1 do: try again later") as refused:
            await jobs.create(a_job(), 1)
        assert refused.value.headers == {"retry-after": "30"}

    base.use(test)


def test_pages_follow_each_other(base: Base) -> None:
    async def test(jobs: Jobs, _other: Jobs) -> None:
        made = [(await jobs.create(a_job(1000.0 + number // 2), 100)).id for number in range(5)]
        await jobs.create(a_job(owner="other"), 100)
        seen: list[str] = []
        after = None
        while True:
            page = await jobs.page("", after, 2, newest_first=True)
            seen += [job.id for job in page.jobs]
            if not page.has_more:
                break
            after = seen[-1]
        assert sorted(seen) == sorted(made)
        backwards = await jobs.page("", None, 100, newest_first=False)
        assert [job.id for job in backwards.jobs] == seen[::-1]
        with pytest.raises(NotFound):
            await jobs.page("", "video_none", 2, newest_first=True)

    base.use(test)


def test_a_deleted_job_is_gone_for_its_caller_at_once(base: Base) -> None:
    async def test(first: Jobs, second: Jobs) -> None:
        job = await first.create(a_job(), 100)
        await first.claim(SERVER)
        with pytest.raises(NotFound):
            await second.cancel(job.id, "somebody else")
        await second.cancel(job.id, "")
        with pytest.raises(NotFound):
            await second.get(job.id, "")
        assert await second.deleted() == [], "the gateway with the lease ends the run"
        assert await first.renew([job.id]) == ({job.id}, {job.id})
        assert [left.id for left in await first.deleted()] == [job.id]
        await first.remove(job.id)
        assert await first.deleted() == []

    base.use(test)


def test_the_oldest_videos_go_first(base: Base) -> None:
    async def test(jobs: Jobs, _other: Jobs) -> None:
        ids = []
        for _ in range(3):
            job = await jobs.create(a_job(), 100)
            await jobs.claim(SERVER)
            base.clock.now_s += 10.0
            await jobs.complete(job.id, 7, {}, 1000)
            ids.append(job.id)
        waiting = await jobs.create(a_job(), 100)
        assert await jobs.expired(0) == []
        assert await jobs.expired(2000) == ids[:1]
        base.clock.now_s += DAY_S - 15.0
        assert await jobs.expired(0) == ids[:1]
        assert await jobs.counts() == {"completed": 3, "queued": 1}
        assert waiting.id not in await jobs.expired(1)

    base.use(test)


def test_old_deliveries_are_forgotten_and_open_ones_are_not(base: Base) -> None:
    async def test() -> None:
        engine = engine_for(base.url)
        jobs = Jobs(engine, 30.0, 1.0, base.clock, webhooks=["http://127.0.0.1:1/hook"])
        for _ in range(2):
            job = await jobs.create(a_job(), 100)
            await jobs.claim(SERVER)
            await jobs.complete(job.id, 7, {}, 10)
        async with engine.begin() as connection:
            some = (await connection.scalars(sa.select(Delivery.id))).all()
            await connection.execute(sa.update(Delivery).where(Delivery.id == some[0]).values(next_at=None))
        postman = Postman(engine, Webhooks(), base.clock)
        for passed_s, left in ((KEPT_S, 2), (1.0, 1)):
            base.clock.now_s += passed_s
            await postman.forget_old()
            async with engine.connect() as connection:
                assert len((await connection.scalars(sa.select(Delivery.id))).all()) == left
        await engine.dispose()

    asyncio.run(test())


def test_a_database_that_is_too_slow_is_unavailable_until_it_is_quick_again(postgresql: Postgres) -> None:
    """Somebody else has locked the table."""

    async def test() -> None:
        engine = engine_for(postgresql.url)
        jobs = Jobs(engine, 30.0, 1.0)
        async with engine.connect() as other:
            await other.execute(sa.text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            with pytest.raises(Unavailable, match="statement timeout"):
                await jobs.counts()
        await jobs.counts()
        await engine.dispose()

    asyncio.run(migrate(postgresql.url))
    asyncio.run(test())


def test_a_database_that_is_away_is_said_in_one_sentence(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        engine = engine_for(url)
        with pytest.raises(Unavailable, match="The database cannot be used"):
            await Jobs(engine, 30.0, 1.0).counts()
        await engine.dispose()

    asyncio.run(test("postgresql+psycopg://nobody@127.0.0.1:1/none"))
    (tmp_path / "no.sqlite").write_bytes(b"no database" * 200)
    asyncio.run(test(f"sqlite+aiosqlite:///{tmp_path / 'no.sqlite'}"))
