"""What a video must pass before it is handed out; [gates] in serve.toml says what happens to one that does not.

Frames are looked at as they come from the decoder, so a clip is never held here. Brightness and change are means over
every 4th pixel of every 4th row, in grey levels of 255.
"""

import logging
import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stepvideo_serve.config import GateMode, GatesConfig, VideoConfig
from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.errors import BadOutput, StepVideoError
from stepvideo_serve.video.mp4 import crop_to_standard, to_uint8
from stepvideo_serve.video.probe import Mp4Facts, probe_mp4

Frames = NDArray[np.uint8]

SAMPLE: Final = 4
MOST_DB: Final = 100.0  # stands for equal pictures, since JSON has no infinity

_logger = logging.getLogger(__name__)


def is_finite(latents: Tensor) -> bool:
    """Whether no value of an fp32 tensor is NaN or infinite. numpy's isfinite takes a 20th of torch's time."""
    return bool(np.isfinite(latents.cpu().numpy()).all())


def not_finite(where: str) -> BadOutput:
    """The error for latents that hold NaN or infinite values; `where` as in "after step 3 of 50"."""
    return BadOutput(
        f"The latents must be finite {where}, got NaN or infinite values: try other inputs; if those fail too, check "
        "the engines with export.verify."
    )


class Gates:
    """One request's gates, called in this order: `latents`, `frames` for every chunk, `ended`, and `mp4`.

    Each raises BadOutput for what [gates] calls an error. `warnings`: what it only warns of, a gate's name and a
    sentence each; also logged. `measured`: first_frame_psnr_db, brightness (of the brightest frame) and change (from
    the first frame to the one that differs most), as far as the gates needed them.
    """

    def __init__(self, config: GatesConfig, video: VideoConfig, num_frames: int, image: Tensor) -> None:
        """image: fp32 [3, H, W] in [-1, 1], fitted to the size of the video."""
        self.warnings: list[dict[str, str]] = []
        self.measured: dict[str, float] = {}
        self._config, self._video = config, video
        self._num_frames, self._image = num_frames, image
        self._size = (0, 0)
        self._count = 0
        self._first: NDArray[np.int16] | None = None

    def latents(self, latents: Tensor) -> None:
        """The loop's result, [F, C, h, w]."""
        if not is_finite(latents):
            raise not_finite("after the last step")

    def frames(self, chunk: Frames) -> None:
        """The next frames, uint8 [n, H, W, 3], cropped as in the file."""
        if self._count == 0 and self._config.first_frame != "off":
            self._compare_with_image(chunk[0])
        self._count += len(chunk)
        self._size = chunk.shape[1], chunk.shape[2]
        sample = chunk[:, ::SAMPLE, ::SAMPLE].astype(np.int16)
        self._first = sample[0] if self._first is None else self._first
        if self._config.black != "off":
            self._note("brightness", float(sample.mean(axis=(1, 2, 3)).max()))
        if self._config.frozen != "off":
            self._note("change", float(np.abs(sample - self._first).mean(axis=(1, 2, 3)).max()))

    def ended(self) -> None:
        """After the last chunk."""
        config, measured = self._config, self.measured
        if self._count == 0:
            raise BadOutput("The decoder must give frames, it gave none: see the server's log.")
        if self._count != self._num_frames:
            self._fail(
                "frame_count",
                config.frame_count,
                f"The video must have {self._num_frames} frames, the decoder gave {self._count}: see the server's log.",
            )
        if config.black != "off" and measured["brightness"] <= config.black_level:
            self._fail(
                "black",
                config.black,
                f"Some frame must be brighter than {config.black_level:g} of 255 on average, the brightest has "
                f"{measured['brightness']:.3g}: try another seed, prompt or image.",
            )
        if config.frozen != "off" and measured["change"] <= config.frozen_difference:
            self._fail(
                "frozen",
                config.frozen,
                f"Some frame must differ from the first by more than {config.frozen_difference:g} of 255 on average, "
                f"the most is {measured['change']:.3g}: try another seed or a higher MOTION_SCORE.",
            )

    def mp4(self, data: bytes) -> None:
        """The file, which is decoded again."""
        mode = self._config.mp4
        if mode == "off":
            return
        expected = Mp4Facts(self._count, *self._size, fps=float(self._video.fps))
        try:
            found = probe_mp4(data, self._video.ffmpeg_threads or usable_cores())
        except StepVideoError as error:
            self._fail("mp4", mode, str(error))
            return
        if found != expected:
            self._fail("mp4", mode, f"The mp4 must hold {expected}, found {found}: send the request again.")

    def report(self) -> dict[str, Any]:
        """For REPORT: warnings, and what was measured."""
        measured = {name: round(value, 3) for name, value in self.measured.items()}
        return {"warnings": self.warnings, "media": measured}

    def _compare_with_image(self, frame: Frames) -> None:
        image = to_uint8(self._image[None])
        expected = crop_to_standard(image)[0] if self._video.crop else image[0]
        psnr_db, least_db = peak_signal_to_noise_db(frame, expected), self._config.first_frame_psnr_db
        self.measured["first_frame_psnr_db"] = psnr_db
        if psnr_db < least_db:
            self._fail(
                "first_frame",
                self._config.first_frame,
                f"The first frame must be like the image, with a PSNR of at least {least_db:g} dB, got "
                f"{psnr_db:.1f} dB: try another seed, or check the engines.",
            )

    def _note(self, name: str, value: float) -> None:
        """Keeps the largest."""
        self.measured[name] = max(value, self.measured.get(name, 0.0))

    def _fail(self, gate: str, mode: GateMode, sentence: str) -> None:
        if mode == "error":
            raise BadOutput(sentence)
        if mode == "warn":
            _logger.warning("gate %s: %s", gate, sentence)
            self.warnings.append({"gate": gate, "message": sentence})


def peak_signal_to_noise_db(picture: Frames, reference: Frames) -> float:
    """PSNR of two pictures uint8 of the same shape: 10 log10(255^2 / mean squared error), at most MOST_DB."""
    squared = float(np.square(picture.astype(np.float32) - reference.astype(np.float32)).mean(dtype=np.float64))
    return MOST_DB if squared == 0 else min(10 * math.log10(255**2 / squared), MOST_DB)
