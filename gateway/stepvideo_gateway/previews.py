"""The last preview of a run, from whoever follows it to whoever watches it, be it on another gateway: a file.

The file is JSON, and what an event says of a preview: step, media_type, data (base64).
"""

import asyncio
import base64
import contextlib
import json
from typing import Any, Final

from stepvideo_client import StepEvent
from stepvideo_gateway.errors import Unavailable
from stepvideo_gateway.store import Store

FILE: Final = "preview.json"


async def keep(store: Store, job_id: str, event: StepEvent) -> None:
    """The event's preview, if it has one, in place of the last. What cannot be kept is left out: the next one may be.

    Cancelled, it returns when nothing is written any more, so that what is then removed stays removed.
    """
    if event.preview is None:
        return
    data = base64.b64encode(event.preview).decode()
    content = json.dumps({"step": event.step, "media_type": event.preview_type, "data": data}).encode()
    writing = asyncio.create_task(asyncio.to_thread(_write, store, job_id, content))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await writing
        raise


async def last(store: Store, job_id: str) -> dict[str, Any] | None:
    """The last preview of a run that is under way."""
    content = await asyncio.to_thread(store.read, job_id, FILE)
    if content is None:
        return None
    said: dict[str, Any] = json.loads(content)
    return said


def forget(store: Store, job_id: str) -> None:
    """The run has ended, or is followed no more."""
    with contextlib.suppress(OSError):
        store.path(job_id, FILE).unlink()


def _write(store: Store, job_id: str, content: bytes) -> None:
    with contextlib.suppress(Unavailable):
        store.write(job_id, FILE, content)
