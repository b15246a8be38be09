"""Backup, loss, restore and migration, with the commands of docs/gateway.md: videos are there, and what ran goes on."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from alembic import command

from stepvideo_gateway.config import DATABASE_VARIABLE
from stepvideo_gateway.database import Job, engine_for, migrations
from stepvideo_gateway.jobs import Jobs
from tests.gateway.conftest import SMALL, Running, create, environment, health, until
from tests.gateway.postgres import USER, Postgres, installed, postgres
from tests.serving.calls import Server
from tests.serving.test_idempotency import runs_of

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

LONG: dict[str, Any] = {**SMALL, "extra_body": {**SMALL["extra_body"], "num_inference_steps": 250}}
NAME = "videos"


@dataclass
class Kept:
    """A database that can be dumped, lost and restored; `url` for the gateway."""

    url: str
    folder: Path

    def run(self, *line: str | Path) -> None:
        done = subprocess.run(
            [str(word) for word in line], capture_output=True, text=True, check=False, cwd=self.folder
        )
        assert done.returncode == 0, done.stderr

    def dump(self) -> None:
        code = 'import sqlite3; sqlite3.connect("jobs.sqlite").execute("VACUUM INTO ?", ["copy.sqlite"])'
        self.run(sys.executable, "-c", code)

    def lose(self) -> None:
        for name in ("jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm"):
            (self.folder / name).unlink(missing_ok=True)

    def restore(self) -> None:
        self.run("cp", "copy.sqlite", "jobs.sqlite")


@dataclass
class KeptPostgres(Kept):
    """The same in PostgreSQL."""

    server: Postgres

    @property
    def address(self) -> str:
        return self.url.replace("+psycopg", "")

    def program(self, name: str, *arguments: str) -> None:
        self.run(self.server.bin / name, *arguments)

    def create(self) -> None:
        self.program("createdb", "-h", "127.0.0.1", "-p", str(self.server.port), "-U", USER, NAME)

    def dump(self) -> None:
        self.program("pg_dump", "--format=custom", "--file=copy.dump", self.address)

    def lose(self) -> None:
        self.program("dropdb", "--force", "-h", "127.0.0.1", "-p", str(self.server.port), "-U", USER, NAME)

    def restore(self) -> None:
        self.create()
        self.program("pg_restore", "--no-owner", f"--dbname={self.address}", "copy.dump")


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Postgres]:
    with postgres(installed()) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    if request.param == "sqlite":
        yield Kept(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}", tmp_path)
        return
    server: Postgres = request.getfixturevalue("postgresql")
    url = f"postgresql+psycopg://{USER}@127.0.0.1:{server.port}/{NAME}"
    database = KeptPostgres(url, tmp_path, server)
    database.create()
    yield database
    database.lose()


def test_finished_videos_and_running_jobs_outlive_the_loss_of_everything(
    start: Callable[..., Running], server: Server, picture: bytes, kept: Kept, tmp_path: Path
) -> None:
    begun = runs_of(server)
    gateway = start(database=kept.url)
    until(lambda: health(gateway)["well"], "the server to be seen")
    client = gateway.client()
    finished = create(gateway, picture)
    assert client.videos.poll(finished.id, poll_interval_ms=200).status == "completed"
    content = client.videos.download_content(finished.id).read()
    running = create(gateway, picture, **LONG)
    until(lambda: client.videos.retrieve(running.id).progress >= 2, "progress")
    kept.dump()
    kept.run("cp", "-a", "videos", "copy.videos")
    later = create(gateway, picture)
    until(lambda: runs_of(server) == begun + 3, "the server to have that one, too")
    gateway.process.kill()
    gateway.process.wait(30)
    kept.lose()
    shutil.rmtree(tmp_path / "videos")
    kept.restore()
    kept.run("cp", "-a", "copy.videos", "videos")
    again = start(database=kept.url)
    client = again.client()
    assert client.videos.download_content(finished.id).read() == content
    assert client.videos.retrieve(running.id).status in ("queued", "in_progress")
    assert client.videos.poll(running.id, poll_interval_ms=200).status == "completed"
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(later.id)
    assert runs_of(server) == begun + 3, "the run that the backup knows was joined, not begun again"


def test_an_older_database_is_brought_forward_by_gateways_that_start_together(
    root: Path, kept: Kept, tmp_path: Path
) -> None:
    """Its rows stay, and its jobs go on."""
    command.upgrade(migrations(kept.url), "0002")
    row = {
        "id": f"video_{'a' * 32}", "owner": "ann", "status": "queued", "created_at": time.time(), "model": "m",
        "prompt": "a cat", "options": '{"num_frames": 17, "height": 64, "width": 96}', "urgency": 2,
        "fingerprint": "f", "attempts": 0, "not_before": 0.0, "cancelled": False, "step": 0, "total_steps": 0,
        "elapsed_s": 0.0, "video_bytes": 0,
    }  # fmt: skip
    columns = ", ".join(row)
    values = ", ".join(f":{name}" for name in row)

    async def add() -> None:
        engine = engine_for(kept.url)
        async with engine.begin() as connection:
            await connection.execute(sa.text(f"INSERT INTO jobs ({columns}) VALUES ({values})"), row)
        await engine.dispose()

    async def claim() -> Job | None:
        engine = engine_for(kept.url)
        job = await Jobs(engine, 30.0, 1.0).claim("a:8001")
        await engine.dispose()
        return job

    asyncio.run(add())
    line = [sys.executable, "-m", "stepvideo_gateway", "migrate"]
    env = {**environment(root), DATABASE_VARIABLE: kept.url, "HOME": os.environ.get("HOME", "/")}
    together = [subprocess.Popen(line, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[1] for process in together]
    assert [process.returncode for process in together] == [0, 0, 0], said
    job = asyncio.run(claim())
    assert job is not None
    assert (job.id, job.owner, job.prompt, job.options["width"]) == (row["id"], "ann", "a cat", 96)
    assert job.traceparent is None
