"""Events of ended jobs, as webhooks hear of them. They are kept in the transaction that ends the job."""

import json
import secrets
from collections.abc import Sequence
from typing import Final

from stepvideo_gateway.database import Delivery

EVENTS: Final = {"completed": "video.completed", "failed": "video.failed"}


def deliveries(job_id: str, status: str, urls: Sequence[str], now: float) -> list[Delivery]:
    """A delivery of the event for each webhook."""
    made = []
    for url in urls:
        event_id = f"evt_{secrets.token_hex(16)}"
        event = {"id": event_id, "object": "event", "created_at": int(now), "type": EVENTS[status]}
        body = json.dumps({**event, "data": {"id": job_id}})
        made.append(Delivery(id=event_id, job=job_id, url=url, body=body, created_at=now, next_at=now))
    return made
