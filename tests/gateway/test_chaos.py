"""Gateway, Triton and PostgreSQL are killed at random moments: each job ends exactly once, and no video is lost.

GATEWAY_JOBS says how many jobs there are: 20, unless make test-gateway GATEWAY_JOBS=200.
"""

import asyncio
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import sqlalchemy as sa

from stepvideo_gateway.database import Delivery, Job, engine_for
from tests.gateway.conftest import Running, create, until
from tests.gateway.postgres import Postgres, installed, postgres

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

JOBS = int(os.environ.get("GATEWAY_JOBS", "20"))
READY = re.compile(r"ready: gRPC (\S+), HTTP (\S+), ")
SMALLEST: dict[str, Any] = {
    "size": "32x32",
    "extra_body": {"num_frames": 17, "num_inference_steps": 8, "guidance_scale": 4.0},
}
# More often than a job is begun by default, Triton is killed under it.
SERVERS = "attempts = 20"
NOBODY = 'urls = ["http://127.0.0.1:1/hook"]\nsecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"\nallow_private = true'
PATIENCE_S = 600.0


@pytest.fixture
def database() -> Iterator[Postgres]:
    with postgres(installed()) as server:
        yield server


@pytest.fixture
def supervised(root: Path, config_text: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The supervisor, which starts a killed Triton again where it was, and the address of gRPC."""
    config = tmp_path / "serve.toml"
    config.write_text(config_text, encoding="utf-8")
    line = [sys.executable, "-m", "stepvideo_serve", "supervise", f"--config={config}", f"--log={tmp_path / 'log'}"]
    line += ["--grpc-port=0", "--http-port=0", "--metrics-port=0", "--exit-timeout=2", "--check-every=2"]
    line += [f"--max-restarts={JOBS}"]  # the supervisor gives up after five an hour by default
    with subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said: list[str] = []
        reader = threading.Thread(target=said.extend, args=(process.stderr,))
        reader.start()
        try:
            ready = READY.match(process.stdout.readline())
            assert ready is not None, said
            yield process, ready[1]
        finally:
            process.kill()
            reader.join()


def triton_of(supervisor: subprocess.Popen[str]) -> psutil.Process | None:
    children = psutil.Process(supervisor.pid).children()
    return next((child for child in children if child.name() == "tritonserver"), None)


def ends_of(url: str) -> tuple[Counter[str], Counter[str]]:
    """How many jobs have each status, and how often each job's end was told."""

    async def look() -> tuple[Counter[str], Counter[str]]:
        engine = engine_for(url)
        async with engine.connect() as connection:
            statuses = Counter((await connection.scalars(sa.select(Job.status))).all())
            told = Counter((await connection.scalars(sa.select(Delivery.job))).all())
        await engine.dispose()
        return statuses, told

    return asyncio.run(look())


def asked(running: Running, picture: bytes, number: int) -> str:
    """A job's id, however often the database or the gateway has to be asked: the key makes one job of them."""
    while True:
        try:
            body = {**SMALLEST["extra_body"], "seed": number}
            headers = {"Idempotency-Key": f"job-{number}"}
            return str(create(running, picture, size="32x32", extra_body=body, extra_headers=headers).id)
        except (openai.InternalServerError, openai.APIConnectionError):
            time.sleep(0.2)


def test_each_job_ends_once_whatever_is_killed(
    start: Callable[..., Running],
    supervised: tuple[subprocess.Popen[str], str],
    database: Postgres,
    picture: bytes,
) -> None:
    supervisor, url = supervised
    settings: dict[str, Any] = {"urls": (url,), "database": database.url, "webhooks": NOBODY, "servers": SERVERS}
    chance, gateway = random.Random(7), start(**settings)
    ids = [asked(gateway, picture, number) for number in range(JOBS)]
    for round_, victim in enumerate(["gateway", "database", "server", "gateway", "database", "server"] * (JOBS // 20)):
        time.sleep(chance.uniform(0.5, 3.0))
        if victim == "gateway":
            gateway.process.kill()
            gateway.process.wait(30)
            gateway = start(**settings)
        elif victim == "database":
            database.kill()
            time.sleep(chance.uniform(0.0, 2.0))
            database.start()
        elif (triton := triton_of(supervisor)) is not None and round_ % 6 == 2:
            triton.kill()
    client = gateway.client()

    def ended() -> bool:
        statuses, _ = ends_of(database.url)
        return statuses["completed"] + statuses["failed"] == JOBS

    until(ended, "all jobs to end", PATIENCE_S)
    statuses, told = ends_of(database.url)
    assert statuses == {"completed": JOBS}
    assert told == dict.fromkeys(ids, 1), "each end is told once"
    videos = {client.videos.download_content(video_id).read() for video_id in ids}
    assert len(videos) == JOBS, "a video each"
