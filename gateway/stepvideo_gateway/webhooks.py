"""Webhooks: events are kept with the job's end, signed as Standard Webhooks say, and sent until they are taken."""

import asyncio
import base64
import hashlib
import hmac
import logging
import math
import time
from collections.abc import Callable
from typing import Final

import httpx2
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from stepvideo_gateway.config import Webhooks, key_of
from stepvideo_gateway.database import Delivery
from stepvideo_gateway.errors import Unavailable
from stepvideo_gateway.outbound import NotAllowed, ask, target_of
from stepvideo_gateway.transactions import Transactions

RETRIES_S: Final = (5.0, 30.0, 120.0, 600.0, 3600.0, 4 * 3600.0, 12 * 3600.0)  # after each failure; then given up
LEASE_S: Final = 60.0
LOOK_S: Final = 0.5
SWEEP_S: Final = 3600.0
KEPT_S: Final = 7 * 86_400.0  # deliveries that are over stay so long in the database, for operators

_logger = logging.getLogger(__name__)


def signature(key: bytes, event_id: str, timestamp: int, body: bytes) -> str:
    """The header webhook-signature (standardwebhooks.com, symmetric)."""
    signed = hmac.new(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(signed).decode()}"


class Postman:
    """Sends deliveries that are due. Several gateways share the work."""

    def __init__(self, engine: AsyncEngine, config: Webhooks, clock: Callable[[], float] = time.time) -> None:
        self._transaction, self._config, self._clock = Transactions(engine), config, clock
        self._key = key_of(config.secret) if config.urls else b""

    async def run(self) -> None:
        """Until cancelled."""
        swept_s = -math.inf
        async with httpx2.AsyncClient(timeout=10.0) as client:
            while True:
                try:
                    if self._clock() - swept_s >= SWEEP_S:
                        swept_s = self._clock()
                        await self.forget_old()
                    while (due := await self._claim()) is not None:
                        await self._send(client, due)
                except Unavailable as error:
                    _logger.warning("database_away: %s", error)
                await asyncio.sleep(LOOK_S)

    async def _claim(self) -> Delivery | None:
        now = self._clock()
        query = sa.select(Delivery).where(Delivery.next_at <= now, Delivery.lease_until < now)
        async with self._transaction() as session:
            due = await session.scalar(query.order_by(Delivery.next_at).limit(1).with_for_update(skip_locked=True))
            if due is not None:
                due.lease_until = now + LEASE_S
            return due

    async def _send(self, client: httpx2.AsyncClient, due: Delivery) -> None:
        body, now = due.body.encode(), int(self._clock())
        headers = {
            "content-type": "application/json",
            "webhook-id": due.id,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(self._key, due.id, now, body),
        }
        try:
            target = await target_of(due.url, self._config.allow_private)
            status, _, _ = await ask(client, "POST", target, headers, body, most_bytes=65_536)
            error = None if 200 <= status < 300 else f"it answered {status}"
        except (httpx2.HTTPError, NotAllowed, TimeoutError, OSError) as failed:
            error = str(failed) or type(failed).__name__
        await self._note(due, error)

    async def _note(self, due: Delivery, error: str | None) -> None:
        attempts = due.attempts + 1
        again = error is not None and attempts <= len(RETRIES_S)
        next_at = self._clock() + RETRIES_S[attempts - 1] if again else None
        if error is None:
            _logger.info("webhook_delivered: %s of %s", due.id, due.job)
        else:
            _logger.warning("webhook_%s: %s of %s: %s", "failed" if again else "given_up", due.id, due.job, error)
        values = {"attempts": attempts, "next_at": next_at, "lease_until": 0.0, "last_error": error}
        async with self._transaction() as session:
            await session.execute(sa.update(Delivery).where(Delivery.id == due.id).values(**values))

    async def forget_old(self) -> None:
        """Removes deliveries that are over, KEPT_S after they were made."""
        before = self._clock() - KEPT_S
        async with self._transaction() as session:
            await session.execute(sa.delete(Delivery).where(Delivery.next_at.is_(None), Delivery.created_at < before))
