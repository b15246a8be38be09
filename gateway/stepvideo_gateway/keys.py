"""API keys: made and removed by the operator, known by their digests, each with limits of its own."""

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from stepvideo_gateway.database import ApiKey, Job
from stepvideo_gateway.errors import BadRequest, ConfigError, Forbidden, TooMany, Unauthorized
from stepvideo_gateway.fields import Asked
from stepvideo_gateway.jobs import ACTIVE, DAY_S
from stepvideo_gateway.transactions import Transactions

PREFIX: Final = "sk-stepvideo-"
MAX_NAME: Final = 64


def digest_of(key: str) -> str:
    """SHA-256 of a key, kept in its place. Keys are random and long, so a plain digest gives nothing away."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


class Keys:
    """All keys. Every method raises Unavailable while the database is away."""

    def __init__(self, engine: AsyncEngine, clock: Callable[[], float] = time.time) -> None:
        self._transaction, self._clock = Transactions(engine), clock

    async def add(self, name: str, **limits: object) -> str:
        """Makes a key, which can be read this once. Raises ConfigError for a name that is taken or empty."""
        if not (0 < len(name) <= MAX_NAME and name.isprintable()):
            raise ConfigError(f"A key's name must have 1 to {MAX_NAME} characters, got {name!r}.")
        key = PREFIX + secrets.token_urlsafe(32)
        async with self._transaction() as session:
            if await session.get(ApiKey, name) is not None:
                raise ConfigError(f"The name {name!r} is taken: remove that key first, or choose another name.")
            session.add(ApiKey(name=name, digest=digest_of(key), created_at=self._clock(), **limits))
        return key

    async def remove(self, name: str) -> bool:
        """Whether there was such a key. Jobs stay until they expire."""
        async with self._transaction() as session:
            result = await session.execute(sa.delete(ApiKey).where(ApiKey.name == name))
            return bool(getattr(result, "rowcount", 0))

    async def all(self) -> Sequence[ApiKey]:
        """All keys, sorted by name."""
        async with self._transaction.reading() as session:
            return (await session.scalars(sa.select(ApiKey).order_by(ApiKey.name))).all()

    async def holder(self, authorization: str | None) -> ApiKey:
        """Whose key came in the header `Authorization: Bearer KEY`. Raises Unauthorized."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("An API key is needed: send the header Authorization: Bearer KEY.")
        async with self._transaction.reading() as session:
            found = await session.scalar(sa.select(ApiKey).where(ApiKey.digest == digest_of(key.strip())))
        if found is None:
            raise Unauthorized("The API key is not known here: ask the operator for one.")
        return found


def check_request(key: ApiKey, asked: Asked) -> None:
    """Raises BadRequest for a video that is too large for the key, Forbidden for a preset that is not its own."""
    pixels = asked.options["num_frames"] * asked.options["height"] * asked.options["width"]
    if key.max_pixels and pixels > key.max_pixels:
        raise BadRequest(
            f"frames x height x width must be at most {key.max_pixels} with this key, got {pixels}: lower them.", "size"
        )
    quality = asked.options.get("quality", "exact")
    if key.presets and quality not in key.presets:
        raise Forbidden(f"quality must be one of {', '.join(key.presets)} with this key, got {quality!r}.", "quality")


async def check_counts(session: AsyncSession, key: ApiKey, now: float) -> None:
    """Raises TooMany when the key's holder has enough jobs. Inside the transaction that adds one."""
    count = sa.select(sa.func.count()).where(Job.owner == key.name)
    if key.max_active:
        active = int(await session.scalar(count.where(Job.status.in_(ACTIVE), ~Job.cancelled)) or 0)
        if active >= key.max_active:
            raise TooMany(f"At most {key.max_active} of your videos may wait or run, {active} do: wait.", None, 30)
    if key.max_per_day:
        today = int(await session.scalar(count.where(Job.created_at > now - DAY_S)) or 0)
        if today >= key.max_per_day:
            raise TooMany(f"At most {key.max_per_day} videos in 24 hours, you asked for {today}: wait.", None, 600)
