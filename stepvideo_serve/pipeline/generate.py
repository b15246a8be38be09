"""One request from prompt and image to video, whatever runs the stages: this process, or the models of a server.

prompt -> text states ─┐
image  -> latent ──────┼─> denoise -> latents -> frames -> mp4
seed   -> noise ───────┘
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepvideo_serve.config import GatesConfig, VideoConfig
from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.errors import DeadlineExceeded, RequestCancelled
from stepvideo_serve.pipeline.output_checks import Gates
from stepvideo_serve.request import OUTPUT_FRAMES, OUTPUT_LATENTS, GenerationRequest, chosen_preset, rank_settings
from stepvideo_serve.request.presets import EVALUATED, FORECAST, Preset, preset_name
from stepvideo_serve.sampling.denoise import needs_guidance, request_noise
from stepvideo_serve.sampling.evaluation import guided_share
from stepvideo_serve.sampling.job import DenoiseJob, StepDone
from stepvideo_serve.scheduling.run_queue import Waiting
from stepvideo_serve.text.states import TextStates
from stepvideo_serve.video.decoding_room import DecodingRoom
from stepvideo_serve.video.image import FittedImage, fit_image_file
from stepvideo_serve.video.mp4 import Mp4Encoder, crop_to_standard

Frames = NDArray[np.uint8]
Cancelled = Callable[[], bool]
Around = Callable[[str], AbstractContextManager[object]]


class Stages(Protocol):
    """What a request passes through. Each may raise a RequestError. `latent_channels` is the C of the shapes, `presets`
    are those that a request's QUALITY may name."""

    latent_channels: int

    @property
    def presets(self) -> Mapping[str, Preset]:
        """Of quality, by name."""
        ...

    def encode_text(self, prompt: str) -> TextStates:
        """States of one prompt."""
        ...

    def encode_image(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """pixels [3, H, W] in [-1, 1], noise [C, h, w] -> latent [C, h, w]."""
        ...

    def denoise(self, job: DenoiseJob, cancelled: Cancelled) -> Iterator[StepDone | Waiting]:
        """One StepDone per step, the last with the latents, and a Waiting while it must wait; stops within a step once
        `cancelled()` is true."""
        ...

    def decode(self, latents: Tensor) -> Iterator[Frames]:
        """latents [F, C, h, w] -> the frames in order, uint8 [n, H, W, 3] a chunk."""
        ...

    def describe(self) -> dict[str, Any]:
        """What ran, for the report: backend, precision, layout, engines."""
        ...


@dataclass(frozen=True)
class Progress:
    """A step is done, or the request waits; `elapsed_s` counts from the acceptance of the request, `preview` is uint8
    [F, h, w, 3] (see LatentPreview), `evaluations` those of the DiT so far."""

    step: int
    total_steps: int
    elapsed_s: float
    preview: NDArray[np.uint8] | None
    waiting: Waiting | None = None
    evaluations: int = 0


@dataclass(frozen=True)
class Result:
    """The one of video (mp4 bytes), frames (uint8 [F, H, W, 3]) and latents (fp32 [F, C, h, w]) that was asked for."""

    video: bytes | None
    frames: Frames | None
    latents: NDArray[np.float32] | None
    seed: int
    report: dict[str, Any]


class Stopwatch:
    """Seconds per stage of one request, and its deadline; `around(name)` is entered with each stage."""

    def __init__(self, timeout_s: float | None, around: Around = nullcontext) -> None:
        self._around = around
        self.began_s = time.monotonic()
        self.timeout_s = timeout_s
        self.seconds: dict[str, float] = {}

    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_s

    def remaining_s(self) -> float | None:
        return None if self.timeout_s is None else max(self.timeout_s - self.elapsed_s(), 0.0)

    def check(self, where: str) -> None:
        """Raises DeadlineExceeded when no time is left."""
        if self.remaining_s() == 0.0:
            raise DeadlineExceeded(
                f"The video must be ready within TIMEOUT_S = {self.timeout_s:g}, which ran out {where}: "
                "ask for fewer steps or frames, or allow more time."
            )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time inside to the stage. Raises DeadlineExceeded on entry when no time is left."""
        self.check(f"before {name}")
        began_s = time.monotonic()
        try:
            with self._around(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began_s


def generate(
    request: GenerationRequest,
    stages: Stages,
    video: VideoConfig,
    cancelled: Cancelled,
    gates: GatesConfig | None = None,
    around: Around = nullcontext,
    decoding: DecodingRoom | None = None,
) -> Iterator[Progress | Result]:
    """Runs the request: a Progress per step, then the Result, which has passed the gates (None: those of a
    configuration without [gates]). `around(name)` is entered with each stage; `decoding` bounds the memory of pictures
    among requests that share it. Raises a RequestError."""
    watch = Stopwatch(request.timeout_s, around)
    height, width = request.height, request.width
    image = _image(request, watch, cancelled, decoding or DecodingRoom())
    pixels = image.pixels
    with watch.stage("text"):
        positive = stages.encode_text(request.positive_prompt)
        negative = stages.encode_text(request.negative_prompt) if needs_guidance(request.cfg_scale) else None
    _check(cancelled)
    passed = Gates(gates or GatesConfig(), video, request.num_frames, pixels)
    latents, encode_noise = _noise(request, stages.latent_channels)
    with watch.stage("vae_encode"):
        condition = stages.encode_image(pixels, encode_noise)
    _check(cancelled)

    settings = rank_settings(request)
    job = DenoiseJob(
        latents=latents,
        condition=condition,
        positive=positive,
        negative=negative,
        settings=settings,
        timeout_s=watch.remaining_s(),
        preset=chosen_preset(settings, stages.presets),
    )
    step_seconds: list[float] = []
    mask = ""
    with watch.stage("denoise"):
        for done in stages.denoise(job, cancelled):
            if isinstance(done, Waiting):
                at, count = len(step_seconds), mask.count(EVALUATED)
                yield Progress(at, request.steps, watch.elapsed_s(), None, done, count)
                continue
            latents = latents if done.latents is None else done.latents
            step_seconds.append(round(done.seconds, 6))
            mask += EVALUATED if done.evaluated else FORECAST
            elapsed_s, count = watch.elapsed_s(), mask.count(EVALUATED)
            yield Progress(done.step, done.total_steps, elapsed_s, done.preview, evaluations=count)
            if done.step < done.total_steps:
                watch.check(f"after step {done.step} of {done.total_steps}")
    _check(cancelled)
    with watch.stage("check"):
        passed.latents(latents)

    mp4, frames = _decode(request, latents, stages, video, watch, cancelled, passed)
    seconds = {name: round(value, 6) for name, value in watch.seconds.items()}
    report = {
        "seed": request.seed,
        "seconds": {"total": round(watch.elapsed_s(), 6), **seconds},
        "step_seconds": step_seconds,
        "frames": request.num_frames,
        "height": height,
        "width": width,
        "steps": request.steps,
        "quality": _quality_report(job, mask),
        "image": image.report,
        **passed.report(),
        **stages.describe(),
    }
    wants_latents = request.output == OUTPUT_LATENTS
    yield Result(mp4, frames, latents.float().cpu().numpy() if wants_latents else None, request.seed, report)


def _quality_report(job: DenoiseJob, mask: str) -> dict[str, Any]:
    """What a request's QUALITY meant and did; `mask` repeats the run."""
    return {
        "preset": preset_name(str(job.settings["quality"])),
        **job.preset.parameters(),
        "mask": mask,
        "evaluations": mask.count(EVALUATED),
        "guided_share": round(guided_share(job.plan(), mask), 6),
    }


def _image(request: GenerationRequest, watch: Stopwatch, cancelled: Cancelled, room: DecodingRoom) -> FittedImage:
    def wanted_still() -> None:
        _check(cancelled)
        watch.check("before the image was decoded")

    with watch.stage("image"):
        return fit_image_file(
            request.image, request.height, request.width, lambda amount: room.hold(amount, wanted_still)
        )


def _noise(request: GenerationRequest, channels: int) -> tuple[Tensor, Tensor]:
    """Starting latents [F, C, h, w] and encode noise [C, h, w]: the request's own, or drawn from its seed."""
    given = None if request.latents is None else torch.from_numpy(request.latents)
    given_noise = None if request.encode_noise is None else torch.from_numpy(request.encode_noise)
    if given is not None and given_noise is not None:
        return given, given_noise[0]
    drawn, drawn_noise = request_noise(request.seed, request.geometry.latent_shape(channels))
    return (drawn if given is None else given), (drawn_noise if given_noise is None else given_noise)[0]


def _decode(
    request: GenerationRequest,
    latents: Tensor,
    stages: Stages,
    video: VideoConfig,
    watch: Stopwatch,
    cancelled: Cancelled,
    gates: Gates,
) -> tuple[bytes | None, Frames | None]:
    """The mp4 or the frames, as asked for, once they have passed the gates. The encoder works on a chunk while the next
    one is decoded."""
    if request.output == OUTPUT_LATENTS:
        return None, None
    chunks = _timed_chunks(stages.decode(latents), video, watch, cancelled, gates)
    if request.output == OUTPUT_FRAMES:
        return None, np.concatenate(list(chunks))
    first = next(chunks)
    with Mp4Encoder(
        first.shape[1], first.shape[2], fps=video.fps, threads=video.ffmpeg_threads or usable_cores()
    ) as encoder:
        with watch.stage("mp4"):
            encoder.write(first)
        for chunk in chunks:
            with watch.stage("mp4"):
                encoder.write(chunk)
        with watch.stage("mp4"):
            mp4 = encoder.finish()
    with watch.stage("check"):
        gates.mp4(mp4)
    return mp4, None


def _timed_chunks(
    chunks: Iterator[Frames], video: VideoConfig, watch: Stopwatch, cancelled: Cancelled, gates: Gates
) -> Iterator[Frames]:
    while True:
        _check(cancelled)
        with watch.stage("vae_decode"):
            chunk = next(chunks, None)
        if chunk is None:
            gates.ended()
            return
        chunk = crop_to_standard(chunk) if video.crop else chunk
        with watch.stage("check"):
            gates.frames(chunk)
        yield chunk


def _check(cancelled: Cancelled) -> None:
    if cancelled():
        raise RequestCancelled("The request was cancelled by its caller.")
