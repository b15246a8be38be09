"""The last preview of a run, as a file: the gateway that follows the run writes it, any gateway reads it.

The file is JSON, as an event has it: step, media_type, data (base64).
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
    """Keeps the event's preview, if it has one, in place of the one before; one that cannot be written is left out.

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
    """Removes the preview: the run has ended, or this gateway does not follow it any more."""
    with contextlib.suppress(OSError):
        store.path(job_id, FILE).unlink()


def _write(store: Store, job_id: str, content: bytes) -> None:
    with contextlib.suppress(Unavailable):
        store.write(job_id, FILE, content)
