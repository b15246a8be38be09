"""What one request takes in the process of its public model, and a run in `dit_denoiser`, measured in this process.

    python -m perf.resources.request PART SIZE

PART: one of PARTS, SIZE: one of SIZES. Prints a JSON object, phase -> Taken. What computes is left out: text states and
latents, of the published model's widths, come at once, and frames from a pattern, as they do from other processes on a
server; the picture, the waiting, the gates, the mp4 and the copies of tensors are the real ones.
"""

import contextlib
import ctypes
import gc
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from stepvideo_serve.config import GatesConfig, VideoConfig
from stepvideo_serve.geometry import FRAMES_PER_CHUNK, VideoGeometry
from stepvideo_serve.parallel.job import StepEvent
from stepvideo_serve.pipeline.generate import Cancelled, Frames, Progress, Result, generate
from stepvideo_serve.planning.model_size import PUBLISHED
from stepvideo_serve.request import GenerationRequest, RequestLimits, parse_request
from stepvideo_serve.request.presets import EXACT, EXACT_PRESET, Preset
from stepvideo_serve.sampling.job import DenoiseJob, StepDone
from stepvideo_serve.scheduling.progress import ResumableDenoise
from stepvideo_serve.scheduling.run_queue import QueuedRun, QueueRules, RunQueue, RunTerms, Waiting
from stepvideo_serve.serving.mailbox import Backlog, Mailbox
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS, TextStates

SIZES: Mapping[str, tuple[int, int, int]] = {
    "small": (34, 64, 64),
    "full size": (102, 544, 992),
    "worst allowed": (204, 544, 992),
}
"""Frames, height, width: the toy world's, the official size, and the most tokens that serve.toml allows."""
PICTURES = {"small": (640, 480), "full size": (4032, 3024), "worst allowed": (8000, 8000)}
PARTS = ("mp4", "frames", "run")
CHANNELS = PUBLISHED.dit.in_channels
RUNS = 8  # that wait behind one
STEPS = 3
LOOK_S = 0.005


@dataclass(frozen=True)
class Taken:
    """In one phase: the highest resident memory over that before the request, and what is left of it at the phase's
    end, in MiB; seconds on the clock, and of CPU, which other work on the machine does not change, of this process and
    its children; threads that were started and files that were opened and are still there."""

    peak_mib: float
    held_mib: float
    seconds: float
    cpu_s: float
    threads: int
    files: int


class Meter:
    """Compares this process with what it was at the beginning."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept of the preparations
        self._rss, self._threads, self._files = _kib("VmRSS"), threading.active_count(), _files()

    def phase(self, act: Callable[[], object], per: int = 1) -> Taken:
        """Runs the phase; divided by `per` requests that it was of."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the highest so far
        began_s, began_cpu_s = time.monotonic(), _cpu_s()
        kept = act()
        seconds, cpu_s = time.monotonic() - began_s, _cpu_s() - began_cpu_s
        peak = round((_kib("VmHWM") - self._rss) / 1024 / per, 1)
        ctypes.CDLL(None).malloc_trim(0)  # the allocator keeps what is free for the next request
        held = round((_kib("VmRSS") - self._rss) / 1024 / per, 1)
        threads, files = threading.active_count() - self._threads, _files() - self._files
        del kept
        each_s, each_cpu_s = (round(value / per, 2) for value in (seconds, cpu_s))
        return Taken(peak, held, each_s, each_cpu_s, round(threads / per), round(files / per))


def _kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1])


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Children:
    """The highest resident memory of ffmpeg, looked at every few milliseconds on a thread of its own."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            for child in psutil.Process().children():
                with contextlib.suppress(OSError):  # it has just ended
                    status = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii")
                    found = re.search(r"VmHWM:\s+(\d+)", status)  # of the program, not of what was before its exec
                    if found is not None and "Name:\tffmpeg" in status:
                        self.peak_mib = max(self.peak_mib, int(found[1]) / 1024)


class Elsewhere:
    """The stages as a server's public model sees them: what they compute is there at once. The job waits first."""

    latent_channels = CHANNELS
    presets: Mapping[str, Preset] = MappingProxyType({EXACT: EXACT_PRESET})

    def __init__(self, geometry: VideoGeometry) -> None:
        self._geometry = geometry

    def encode_text(self, prompt: str) -> TextStates:  # noqa: ARG002
        llm, clip = (PUBLISHED.dit.llm_channels, PUBLISHED.dit.clip_channels)
        return TextStates(llm=torch.ones(LLM_MAX_TOKENS, llm), clip=torch.ones(CLIP_TOKENS, clip))

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        return noise.clone()

    def denoise(self, job: DenoiseJob, cancelled: Cancelled) -> Iterator[StepDone | Waiting]:  # noqa: ARG002
        yield Waiting(1, None)
        for step in range(1, job.steps + 1):
            yield StepDone(step, job.steps, 0.01, None, job.latents.clone() if step == job.steps else None)

    def decode(self, latents: Tensor) -> Iterator[Frames]:  # noqa: ARG002
        rows, columns = np.mgrid[: self._geometry.height, : self._geometry.width]
        picture = np.stack([rows % 256, columns % 256, (rows + columns) % 256], -1).astype(np.uint8)
        for chunk in range(self._geometry.chunks):
            frames = range(chunk * FRAMES_PER_CHUNK, (chunk + 1) * FRAMES_PER_CHUNK)
            yield np.stack([np.roll(picture, frame, axis=1) for frame in frames])

    def describe(self) -> dict[str, Any]:
        return {}


def picture(size: str) -> bytes:
    """A JPEG, for "worst allowed" the WebP of 64 megapixels whose decoder holds four copies."""
    file = io.BytesIO()
    image = Image.new("RGB", PICTURES[size], (90, 120, 150))
    image.save(file, "WEBP" if size == "worst allowed" else "JPEG")
    return file.getvalue()


def request_of(size: str, output: str) -> GenerationRequest:
    """The size's request, as a public model has parsed it."""
    numbers = dict(zip(("NUM_FRAMES", "HEIGHT", "WIDTH", "STEPS"), (*SIZES[size], STEPS), strict=True))
    texts = {"PROMPT": b"a cat", "IMAGE": picture(size), "OUTPUT": output.encode()}
    inputs = {name: np.array([text], np.object_) for name, text in texts.items()}
    return parse_request(
        {**inputs, **{name: np.array([value], np.int32) for name, value in numbers.items()}}, RequestLimits(), CHANNELS
    )


def public_model(size: str, output: str) -> dict[str, Taken]:
    """In `ti2v` or `ti2v_unary`."""
    request = request_of(size, output)
    events = generate(request, Elsewhere(request.geometry), VideoConfig(), lambda: False, GatesConfig())
    meter = Meter()
    taken = {"before the queue": meter.phase(lambda: next(events))}

    def steps() -> None:
        for event in events:
            if isinstance(event, Progress) and event.step == STEPS:
                return

    taken["waiting and running"] = meter.phase(steps)
    results: list[object] = []
    with Children() as children:
        after = meter.phase(lambda: results.extend(events))
    assert isinstance(results[0], Result)
    taken["after"] = replace(after, threads=after.threads - 1)  # without the one that looks
    if output == "mp4":
        taken["ffmpeg beside it"] = Taken(round(children.peak_mib, 1), 0.0, after.seconds, 0.0, 0, 0)
    return taken


def run(size: str) -> dict[str, Taken]:
    """In `dit_denoiser`, for each of RUNS that wait behind another one; and of one that is under way."""
    frames, height, width = SIZES[size]
    shape = VideoGeometry(frames, height, width).latent_shape(CHANNELS)
    llm, clip = PUBLISHED.dit.llm_channels, PUBLISHED.dit.clip_channels
    backlog, over = Backlog(1 << 30), threading.Event()

    def tensors() -> dict[str, Any]:
        texts = {
            f"{branch}_{kind}": np.ones(size, np.float32)
            for branch in ("positive", "negative")
            for kind, size in (("llm", (LLM_MAX_TOKENS, llm)), ("clip", (CLIP_TOKENS, clip)))
        }
        return {"latents": np.ones(shape, np.float32), "condition": np.ones(shape[1:], np.float32), **texts}

    def new_run(name: str) -> QueuedRun:
        mailbox = Mailbox(lambda: None, backlog)
        mailbox.start()
        return QueuedRun(name, RunTerms(ResumableDenoise({"settings": {}}, tensors(), STEPS), parkable=True), mailbox)

    def serve(queued: QueuedRun) -> bool:
        over.wait()
        queued.answer.close()
        return True

    queue = RunQueue(QueueRules(RUNS), serve, over.set, lambda _: None)
    queue.put(new_run("first"))
    meter = Meter()

    def fill() -> None:
        for number in range(RUNS):
            queue.put(new_run(str(number)))

    taken = {"waiting": meter.phase(fill, RUNS)}
    job = ResumableDenoise({"settings": {}}, tensors(), STEPS)
    meter = Meter()

    def steps() -> None:
        for step in range(1, STEPS + 1):
            event = StepEvent({"step": step}, {"latents": np.ones(shape, np.float32)})
            job.take(event)

    taken["running"] = meter.phase(steps)
    queue.close()
    return taken


def main() -> int:
    part, size = sys.argv[1:]
    taken = run(size) if part == "run" else public_model(size, part)
    print(json.dumps({phase: asdict(each) for phase, each in taken.items()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
