"""Run by Alembic: connects to the database of its configuration and applies the steps."""

import asyncio

from alembic import context
from sqlalchemy import Connection

from stepvideo_gateway.database import Base, engine_for

LOCK = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "SELECT pg_advisory_xact_lock(7357210010)",  # any number that nobody else uses there
}


def _migrate(connection: Connection) -> None:
    """In one transaction, which gateways that start together enter one after the other."""
    connection.exec_driver_sql(LOCK[connection.dialect.name])
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


async def _run() -> None:
    engine = engine_for(context.config.attributes["url"])
    async with engine.connect() as connection:
        await connection.run_sync(_migrate)
        await connection.commit()
    await engine.dispose()


asyncio.run(_run())
