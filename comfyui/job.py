"""One video from its request to the mp4: followed, shown, and ended on the server when nobody waits for it any more."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .errors import Away, Failed, Interrupted, Refused
from .gateway import Gateway
from .preview import Preview, decoded
from .report import state_of
from .request import Request

TICK_S = 0.1  # between two looks for an interrupt, and between two frames of a preview at most
QUIET_S = 5.0  # without an event, after which the connection is made again; between two looks at the servers
QUIETS = 4  # at least so many in an idle timeout
PAUSE_S = 1.0  # before a lost connection is made again
TRIES = 3
GIVE_UP_S = 15.0  # that ending a run may take
ENDED = ("completed", "failed")

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class Host(Protocol):
    """Where a job shows how far it is, and hears that nobody wants it any more."""

    def interrupted(self) -> bool:
        """Whether the user has stopped the workflow."""

    async def progress(self, value: float, most: float, picture: Any | None) -> None:
        """Moves the bar, and shows a picture (of PIL) where there is one."""

    def say(self, text: str) -> None:
        """Shows a text."""


@dataclass(frozen=True)
class Made:
    """The mp4, its video object, and whether it was there before."""

    mp4: bytes
    video: dict[str, Any]
    repeated: bool


async def make(gateway: Gateway, request: Request, host: Host) -> Made:
    """The video of a request. Cancelled or interrupted, it ends the run on the server within a step.

    Raises StepVideoError, and Interrupted when the user has stopped the workflow.
    """
    video = await _created(gateway, request, host)
    repeated = video["status"] == "completed"
    try:
        if not repeated:
            video = await _Follower(gateway, video, host).ended()
    except (Interrupted, asyncio.CancelledError):
        await _end(gateway, video["id"])
        raise
    if video["status"] == "failed":
        error = video.get("error") or {}
        raise Failed(str(error.get("message") or "The server gave no reason."))
    return Made(await unless_interrupted(_again(gateway.content, video["id"]), host), video, repeated)


async def unless_interrupted(work: Awaitable[T], host: Host) -> T:
    """What `work` gives; it is cancelled when the user stops the workflow. Raises Interrupted then."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=TICK_S)
            if host.interrupted():
                raise Interrupted
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _created(gateway: Gateway, request: Request, host: Host) -> dict[str, Any]:
    """The video object; a job that failed before is removed, and made anew."""
    creating = asyncio.ensure_future(_create(gateway, request))
    try:
        return await unless_interrupted(asyncio.shield(creating), host)
    except (Interrupted, asyncio.CancelledError):
        # The gateway may have taken the job just now: it is waited for, and ended.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(GIVE_UP_S):
                video = await creating
                if video["status"] not in ENDED:
                    await gateway.delete(video["id"])
        raise


async def _create(gateway: Gateway, request: Request) -> dict[str, Any]:
    create = gateway.create
    video = await _again(create, request.fields, request.picture, request.key)
    if video["status"] == "failed":
        await gateway.delete(video["id"])
        video = await _again(create, request.fields, request.picture, request.key)
    return video


async def _again(call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Calls until the gateway answers, at most TRIES times."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(Away):
            return await call(*arguments)
        await asyncio.sleep(PAUSE_S)
    return await call(*arguments)


async def _end(gateway: Gateway, video_id: str) -> None:
    """Ends the run on the server; tried once more if this task is cancelled meanwhile."""
    for _ in range(2):
        try:
            async with asyncio.timeout(GIVE_UP_S):
                await gateway.delete(video_id)
            return
        except asyncio.CancelledError:
            continue
        except (Away, Refused, TimeoutError) as error:
            _logger.warning("%s may still run on the server: %s", video_id, error)
            return


class _Follower:
    """Follows one job until it ends: a reader keeps its state, and a loop shows it and looks for interrupts."""

    def __init__(self, gateway: Gateway, video: dict[str, Any], host: Host) -> None:
        self._gateway, self._video, self._host = gateway, video, host
        self._quiet_s = min(QUIET_S, gateway.address.idle_timeout_s / QUIETS)
        self._heard_s = time.monotonic()
        self._unwell_s: float | None = None  # since when the gateway says that nothing can be done
        self._first: tuple[int, float] | None = None  # a step, and when it was heard of
        self._preview: Preview | None = None
        self._preview_s, self._shown = 0.0, (-1, -1.0)

    async def ended(self) -> dict[str, Any]:
        """The video object of the ended job."""
        reader, watcher = asyncio.ensure_future(self._read()), asyncio.ensure_future(self._watch())
        try:
            while not reader.done():
                await self._show()
                await asyncio.wait({reader}, timeout=TICK_S)
                if self._host.interrupted():
                    raise Interrupted
                self._check()
            reader.result()
        finally:
            for task in (reader, watcher):
                task.cancel()
            await asyncio.gather(reader, watcher, return_exceptions=True)
        return self._video

    def _check(self) -> None:
        """Raises Away when nobody has answered, or nothing could be done, for too long."""
        url, most_s, now_s = self._gateway.address.url, self._gateway.address.idle_timeout_s, time.monotonic()
        again = "queue the workflow again when it is back, and its video is found"
        if now_s - self._heard_s > most_s:
            raise Away(f"The gateway at {url} has given no sign of life for {most_s:g} s: {again}.")
        if self._unwell_s is not None and now_s - self._unwell_s > most_s:
            lacks = f"has no server that is ready, or no database or folder that works, since {most_s:g} s"
            raise Away(f"The gateway at {url} {lacks} ({url}/health tells): {again}.")

    async def _read(self) -> None:
        """Hears the events until the job has ended."""
        while True:
            with contextlib.suppress(Away):
                async for name, data in self._gateway.events(self._video["id"], self._quiet_s):
                    await self._take(name, data)
                    if self._video["status"] in ENDED:
                        return
            await asyncio.sleep(min(PAUSE_S, self._quiet_s))

    async def _watch(self) -> None:
        """Asks now and then whether some server is ready: a job without one waits in silence."""
        while True:
            with contextlib.suppress(Away):
                well = await self._gateway.is_well()
                self._unwell_s = None if well else self._unwell_s or time.monotonic()
            await asyncio.sleep(self._quiet_s)

    async def _take(self, name: str, data: dict[str, Any]) -> None:
        self._heard_s = time.monotonic()
        if name == "video.deleted":
            raise Failed("The video was deleted at the gateway while this node waited: queue the workflow again.")
        if name == "video.preview":
            preview = await asyncio.to_thread(decoded, str(data.get("data")))
            if preview is not None:
                self._preview, self._preview_s, self._shown = preview, time.monotonic(), (-1, -1.0)
        elif "status" in data:
            self._video = data
            if (step := data.get("step") or 0) and self._first is None:
                self._first = (step, self._heard_s)

    async def _show(self) -> None:
        """The bar, the text, and the frame of the preview that is due, when one of them has changed."""
        steps, step = self._video.get("total_steps") or 1, float(self._video.get("step") or 0)
        frame = -1 if self._preview is None else self._preview.at(time.monotonic() - self._preview_s)
        self._host.say(state_of(self._video, self._left_s()))
        if (frame, step) != self._shown:
            self._shown = (frame, step)
            picture = None if self._preview is None else self._preview.frames[frame]
            await self._host.progress(step, steps, picture)

    def _left_s(self) -> float | None:
        """From the pace of the steps that were heard of."""
        step, steps = self._video.get("step") or 0, self._video.get("total_steps") or 0
        if self._first is None or step <= self._first[0]:
            return None
        pace_s = (self._heard_s - self._first[1]) / (step - self._first[0])
        return pace_s * (steps - step)
