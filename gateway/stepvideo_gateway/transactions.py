"""One transaction on the database, whose errors are Unavailable."""

import contextlib
from typing import Final

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from stepvideo_gateway.errors import Unavailable

STATEMENT_MS: Final = 5000  # as SQLite's BUSY_TIMEOUT_MS: then the database is too slow to be of use


class Transactions:
    """Makes transactions: `async with transactions() as session`; `reading()` makes one that writes nothing."""

    def __init__(self, engine: AsyncEngine) -> None:
        sqlite = engine.dialect.name == "sqlite"
        self._reading = None if sqlite else f"SET LOCAL statement_timeout = {STATEMENT_MS}"
        self._writing = "BEGIN IMMEDIATE" if sqlite else self._reading
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    def __call__(self) -> "Transaction":
        return Transaction(self._sessions(), self._writing)

    def reading(self) -> "Transaction":
        """A transaction that writes nothing: it waits for no writer, and no writer waits for it."""
        return Transaction(self._sessions(), self._reading)


class Transaction:
    """A session that commits at the end. `first`: its first statement. A writer takes SQLite's lock of writers at once,
    so that no other writer comes between reading and writing; PostgreSQL is told how long a statement may take."""

    def __init__(self, session: AsyncSession, first: str | None) -> None:
        self._session, self._first = session, first

    async def __aenter__(self) -> AsyncSession:
        try:
            if self._first is not None:
                await self._session.execute(sa.text(self._first))
        except (SQLAlchemyError, OSError) as error:
            with contextlib.suppress(SQLAlchemyError, OSError):  # the first error says what is wrong
                await self._session.close()
            raise away(error) from error
        return self._session

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        try:
            try:
                if error is None:
                    await self._session.commit()
            finally:
                await self._session.close()
        except (SQLAlchemyError, OSError) as failed:
            raise away(failed) from failed
        if isinstance(error, SQLAlchemyError | OSError):
            raise away(error) from error


def away(error: BaseException) -> Unavailable:
    """The error that a caller gets in the place of one of the database."""
    reason = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    line = (reason.splitlines() or [type(error).__name__])[0][:200]
    return Unavailable(f"The database cannot be used ({line}): try again.", retry_after_s=5)
