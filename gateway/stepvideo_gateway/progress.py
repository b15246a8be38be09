"""A job's progress as server-sent events: the video object whenever it changes, and previews as they come."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

from stepvideo_gateway import previews
from stepvideo_gateway.database import Job
from stepvideo_gateway.errors import ApiError, Unavailable
from stepvideo_gateway.fields import PREVIEW
from stepvideo_gateway.jobs import COMPLETED, FAILED
from stepvideo_gateway.service import Gateway
from stepvideo_gateway.video_object import video_object

EVENT_S: Final = 0.5
EVENTS: Final = {COMPLETED: "video.completed", FAILED: "video.failed"}


async def progress_of(gateway: Gateway, job: Job) -> AsyncIterator[bytes]:
    """video.progress with the video object whenever it has changed, video.preview whenever there is a new one; then
    video.completed, video.failed or video.deleted."""
    shown: dict[str, Any] | None = None
    seen: dict[str, Any] | None = None
    while True:
        now = video_object(job)
        if now != shown:
            shown = now
            yield _event(EVENTS.get(job.status, "video.progress"), now)
            if job.status in EVENTS:
                return
        preview = await previews.last(gateway.store, job.id) if PREVIEW in job.options else None
        if preview is not None and preview != seen:
            seen = preview
            yield _event("video.preview", {"id": job.id, **preview})
        await asyncio.sleep(EVENT_S)
        try:
            job = await gateway.jobs.get(job.id, job.owner)
        except Unavailable:
            continue
        except ApiError:
            yield _event("video.deleted", {"id": job.id})
            return


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
