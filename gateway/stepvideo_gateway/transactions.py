"""One transaction on the database, whose errors are Unavailable."""

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from stepvideo_gateway.errors import Unavailable


class Transactions:
    """Makes them: `async with transactions() as session`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._sqlite = engine.dialect.name == "sqlite"
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    def __call__(self) -> "Transaction":
        return Transaction(self._sessions(), self._sqlite)


class Transaction:
    """A session that commits at the end. SQLite's begins by writing, so that no other writer comes between reading and
    writing."""

    def __init__(self, session: AsyncSession, sqlite: bool) -> None:
        self._session, self._sqlite = session, sqlite

    async def __aenter__(self) -> AsyncSession:
        try:
            if self._sqlite:
                await self._session.execute(sa.text("BEGIN IMMEDIATE"))
        except (SQLAlchemyError, OSError) as error:
            await self._session.close()
            raise away(error) from error
        return self._session

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        try:
            if error is None:
                await self._session.commit()
        except (SQLAlchemyError, OSError) as failed:
            raise away(failed) from failed
        finally:
            await self._session.close()
        if isinstance(error, SQLAlchemyError | OSError):
            raise away(error) from error


def away(error: BaseException) -> Unavailable:
    """What a caller hears of an error of the database."""
    reason = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    line = (reason.splitlines() or [type(error).__name__])[0][:200]
    return Unavailable(f"The database cannot be used ({line}): try again.", retry_after_s=5)
