"""One clip on its way: asked for on a server, received, and put into the folder."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from stepvideo_client.errors import MalformedResponse
from stepvideo_client.evaluation.endpoint import Endpoint
from stepvideo_client.evaluation.folder import BatchFolder
from stepvideo_client.evaluation.plan import PlannedClip, Settings, request_id
from stepvideo_client.evaluation.results import LATENTS, VIDEOS, Clip, append
from stepvideo_client.events import Result, StepEvent
from stepvideo_client.fields import Options
from stepvideo_client.options import image_bytes


@dataclass(eq=False)
class Job:
    """A clip to make. attempts: how many have failed; not_before_s: on the clock of time.monotonic; avoid: the server
    that failed last."""

    clip: PlannedClip
    attempts: int = 0
    not_before_s: float = 0.0
    avoid: str | None = None


@dataclass(eq=False)
class Flight:
    """A clip that a server was asked for, on a connection of its own: closing that cancels nothing else.

    begun: whether the server works on it; until then it waits there. Exactly one of `clip` and `error` is set at the
    end, neither when it was cancelled here. heard_s: when the server last said something, on the clock of
    time.monotonic; 0: never. servers: how many work at the other end; 0: not known yet.
    """

    job: Job
    url: str
    endpoint: Endpoint
    begun: bool = False
    cancelled: bool = False
    clip: Clip | None = None
    error: BaseException | None = None
    heard_s: float = 0.0
    servers: int = 0

    def cancel(self) -> None:
        """Cancels the clip, also on the server. Any thread may call."""
        self.cancelled = True
        self.endpoint.close()

    def fly(self, folder: BatchFolder, settings: Settings, priority: int, changed: Callable[[], None]) -> None:
        """Makes the clip, without raising; `changed` is called when that begins, and when `servers` is known."""
        try:
            with closing(self.endpoint):
                self.servers = self.endpoint.servers()
                changed()
                self.clip = self._make(folder, settings, priority, changed)
        except BaseException as error:  # looked at by the thread that started this one
            if not self.cancelled:
                self.error = error

    def _make(self, folder: BatchFolder, settings: Settings, priority: int, changed: Callable[[], None]) -> Clip:
        planned = self.job.clip
        picture = image_bytes(planned.entry.image)
        options: dict[str, Any] = {**planned.options(settings)}
        outputs = ("mp4", "latents") if settings.latents else ("mp4",)
        started_s = time.monotonic()
        results = {
            output: self._receive(picture, {**options, "output": output}, priority, changed) for output in outputs
        }
        seconds = time.monotonic() - started_s
        result = results["mp4"]
        latents = self._save_latents(folder, results["latents"]) if settings.latents else None
        video = f"{VIDEOS}/{planned.name}.mp4"
        content = result.video
        if content is None:
            raise MalformedResponse(f"The server at {self.url} sent no VIDEO: is it older than the client?")
        size = folder.write(video, lambda file: file.write(content))
        clip = Clip(
            id=planned.entry.id,
            index=planned.index,
            video=video,
            image=str(planned.entry.image),
            prompt=planned.entry.prompt,
            motion=planned.motion,
            seed=result.seed,
            preset=planned.preset,
            request=options,
            report=result.report,
            evaluations_mask=_mask(result.report),
            latents=latents,
            server=self.url,
            seconds=round(seconds, 3),
            bytes=size,
        )
        append(folder.path, clip)
        for received in results.values():
            self.endpoint.settle(received)
        return clip

    def _receive(self, picture: bytes, options: dict[str, Any], priority: int, changed: Callable[[], None]) -> Result:
        clip = self.job.clip
        self.begun = False
        name = request_id(clip, options, picture)
        sent = cast(Options, {**options, "priority": priority, "request_id": name})
        with closing(self.endpoint.generate(picture, clip.entry.prompt, sent)) as events:
            for event in events:
                self.heard_s = time.monotonic()
                if isinstance(event, Result):
                    return event
                if not self.begun and _has_begun(event):
                    self.begun = True
                    changed()
        raise MalformedResponse("The generation ended without a result.")

    def _save_latents(self, folder: BatchFolder, result: Result) -> str:
        latents = result.latents
        if latents is None:
            raise MalformedResponse(f"The server at {self.url} sent no LATENTS: is it older than the client?")
        path = f"{LATENTS}/{self.job.clip.name}.npy"
        folder.write(path, lambda file: np.save(file, latents, allow_pickle=False))
        return path


def _has_begun(event: StepEvent) -> bool:
    return event.step > 0 and event.queue_position is None


def _mask(report: Any) -> list[int] | None:
    """REPORT's mask as numbers."""
    quality = report.get("quality")
    mask = quality.get("mask") if isinstance(quality, dict) else None
    return [int(digit) for digit in mask] if isinstance(mask, str) and set(mask) <= {"0", "1"} else None
