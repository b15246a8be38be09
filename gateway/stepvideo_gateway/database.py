"""The tables, and how they are reached: SQLite for one gateway, PostgreSQL for several."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

BUSY_TIMEOUT_MS = 10_000  # how long SQLite waits for another writer
# To PostgreSQL: a connection whose other end is gone without a word is noticed within half a minute.
POSTGRESQL: Mapping[str, int] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}


class Base(DeclarativeBase):
    """The base class of all tables."""

    type_annotation_map = {dict[str, Any]: sa.JSON, float: sa.Double}  # noqa: RUF012  # SQLAlchemy's way


class Job(Base):
    """One request for a video. Times are unix seconds.

    owner            name of the key with which the job was made; "" where no keys are asked for
    status           queued, in_progress, completed or failed
    options          of the generation, as the client's options
    urgency          1 high, 2 normal, 3 low
    server           the server that has the job, or had it last
    lease            the gateway that looks after the job; `lease_until` None: no gateway does
    not_before       when the job may be tried again
    cancelled        its caller has deleted the job: the run is to end, and then the row is removed
    step ...         progress of the run, as the server told last
    traceparent      of the request that made the job (traces.py); None for jobs of gateways that had no traces yet
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(sa.String(64), default="")
    status: Mapped[str] = mapped_column(sa.String(16), default="queued")
    created_at: Mapped[float]
    completed_at: Mapped[float | None] = mapped_column(default=None)
    expires_at: Mapped[float | None] = mapped_column(default=None)
    model: Mapped[str] = mapped_column(sa.String(64))
    prompt: Mapped[str] = mapped_column(sa.Text)
    options: Mapped[dict[str, Any]]
    urgency: Mapped[int] = mapped_column(default=2)
    remixed_from: Mapped[str | None] = mapped_column(sa.String(64), default=None)
    idempotency_key: Mapped[str | None] = mapped_column(sa.String(255), default=None)
    fingerprint: Mapped[str] = mapped_column(sa.String(64))
    server: Mapped[str | None] = mapped_column(sa.String(255), default=None)
    lease: Mapped[str | None] = mapped_column(sa.String(64), default=None)
    lease_until: Mapped[float | None] = mapped_column(default=None)
    attempts: Mapped[int] = mapped_column(default=0)
    not_before: Mapped[float] = mapped_column(default=0.0)
    cancelled: Mapped[bool] = mapped_column(default=False)
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int] = mapped_column(default=0)
    queue_position: Mapped[int | None] = mapped_column(default=None)
    start_in_s: Mapped[float | None] = mapped_column(default=None)
    elapsed_s: Mapped[float] = mapped_column(default=0.0)
    seed: Mapped[int | None] = mapped_column(sa.BigInteger, default=None)
    report: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON, default=None)
    video_bytes: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    error_code: Mapped[str | None] = mapped_column(sa.String(64), default=None)
    error_message: Mapped[str | None] = mapped_column(sa.Text, default=None)
    traceparent: Mapped[str | None] = mapped_column(sa.String(55), default=None)

    __table_args__ = (
        sa.UniqueConstraint("owner", "idempotency_key", name="uq_jobs_idempotency"),
        sa.Index("ix_jobs_claim", "status", "urgency", "created_at"),
        sa.Index("ix_jobs_list", "owner", "created_at"),
    )


class ApiKey(Base):
    """A caller's key, of which only the SHA-256 is kept. A limit of 0, or an empty list, is no limit.

    max_active   jobs that may wait or run at the same time
    max_running  jobs that servers may have at the same time; others wait
    max_per_day  jobs in 24 hours
    max_pixels   of one video: frames x height x width
    presets      values of quality that are allowed
    """

    __tablename__ = "api_keys"

    name: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(sa.String(64), unique=True)
    created_at: Mapped[float]
    max_active: Mapped[int] = mapped_column(default=0)
    max_per_day: Mapped[int] = mapped_column(default=0)
    max_pixels: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    presets: Mapped[list[str]] = mapped_column(sa.JSON, default=list)
    max_running: Mapped[int] = mapped_column(default=0)


class Delivery(Base):
    """An event that a webhook is to be told; times are unix seconds.

    next_at       when it is sent next; None: delivered, or given up
    lease_until   until then a gateway is sending it
    """

    __tablename__ = "deliveries"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    job: Mapped[str] = mapped_column(sa.String(64))
    url: Mapped[str] = mapped_column(sa.Text)
    body: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[float]
    attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[float | None]
    lease_until: Mapped[float] = mapped_column(default=0.0)
    last_error: Mapped[str | None] = mapped_column(sa.Text, default=None)

    __table_args__ = (sa.Index("ix_deliveries_next", "next_at"),)


def engine_for(url: str) -> AsyncEngine:
    """An engine; a SQLite file is in WAL mode and its folder is made."""
    if not url.startswith("sqlite"):
        return create_async_engine(url, pool_pre_ping=True, pool_timeout=5, connect_args=dict(POSTGRESQL))
    file = sa.make_url(url).database
    if file:
        Path(file).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_async_engine(url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})

    @event.listens_for(engine.sync_engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")  # a job is on the disk before its caller is told so
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA secure_delete=ON")  # deleted prompts do not stay in free pages
        cursor.close()

    return engine


async def migrate(url: str) -> None:
    """Brings the tables to the newest form, if they have an older one."""
    await asyncio.to_thread(command.upgrade, migrations(url), "head")


def migrations(url: str) -> Config:
    """Alembic's configuration, without a file of its own."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["url"] = url
    return config
