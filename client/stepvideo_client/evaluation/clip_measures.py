"""What can be told of one clip without any model: the figures of `stepvideo metrics`.

A clip's frames are taken one at a time, and nothing but a contact sheet is kept of them. Levels are 0 .. 255.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from stepvideo_client.evaluation.first_picture import crop_centre
from stepvideo_client.evaluation.motion import MotionMeter
from stepvideo_client.evaluation.sheets import contact_sheet, thumbnail
from stepvideo_client.evaluation.statistics import psnr_db
from stepvideo_client.evaluation.video import Frame

CHUNK_FRAMES: Final = 17  # the video decoder's: it makes each chunk of so many frames by itself
SEAM_FLOOR: Final = 0.1  # levels: a smaller change counts as none
DARK_LEVEL: Final = 5
BRIGHT_LEVEL: Final = 250
BLACK_LEVEL: Final = 2.0  # as the server's gate: no frame is brighter on average
FROZEN_LEVEL: Final = 0.5  # no frame differs more from the first; the server's gate is stricter, before the encoder
SHEET_FRAMES: Final = 7


@dataclass(frozen=True)
class ClipMeasures:
    """Of one clip; None where a figure cannot be told. docs/evaluation.md says how to read them.

    frames, height, width
    first_frame_psnr_db, first_frame_ssim   against the fitted picture
    temporal_flickering  (255 - mean |f_t - f_(t+1)|) / 255, as VBench defines it
    motion_px, motion_fastest_px, still_share, smoothness   by optical flow (motion.py)
    seam             mean change at the borders of chunks over the median change elsewhere
    sharpness        mean over frames of the variance of the Laplacian of the grey frame
    sharpness_kept   that of the last frame over that of the first
    brightness       mean level of the grey frames
    dark_share, bright_share   of the pixels, up to level 5 and from level 250 on
    black, frozen    whether the clip is
    """

    frames: int
    height: int
    width: int
    first_frame_psnr_db: float | None
    first_frame_ssim: float | None
    temporal_flickering: float | None
    motion_px: float | None
    motion_fastest_px: float | None
    still_share: float | None
    smoothness: float | None
    seam: float | None
    sharpness: float
    sharpness_kept: float | None
    brightness: float
    dark_share: float
    bright_share: float
    black: bool
    frozen: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class MeasuredClip:
    """A clip's figures and what a page shows of it: the changes between neighbouring frames (mean levels), the motion
    between them (pixels), and a contact sheet (JPEG)."""

    measures: ClipMeasures
    changes: tuple[float, ...]
    motion_px: tuple[float, ...]
    sheet: bytes


class ClipMeter:
    """Takes a clip's frames in order. picture: the fitted first picture, at least as large as the frames, or None."""

    def __init__(self, picture: Frame | None = None) -> None:
        self._picture = picture
        self._motion = MotionMeter()
        self._first: Frame | None = None
        self._last: Frame | None = None
        self._against_picture: tuple[float | None, float | None] = (None, None)
        self._thumbnails: list[Frame] = []
        self._changes: list[float] = []
        self._from_first: list[float] = []
        self._sharpness: list[float] = []
        self._colour_means: list[float] = []
        self._levels: list[tuple[float, float, float]] = []

    def add(self, frame: Frame) -> None:
        """The next frame, uint8 [H, W, 3]."""
        if self._first is None or self._last is None:
            self._first = frame
            if self._picture is not None:
                self._compare_with_picture(frame, crop_centre(self._picture, *frame.shape[:2]))
        else:
            self._changes.append(mean_difference(frame, self._last))
            self._from_first.append(mean_difference(frame, self._first))
        self._last = frame
        self._motion.add(frame)
        self._thumbnails.append(thumbnail(frame))
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        self._sharpness.append(float(cv2.Laplacian(grey, cv2.CV_64F).var()))
        self._colour_means.append(float(frame.mean()))
        self._levels.append(
            (float(grey.mean()), float((grey <= DARK_LEVEL).mean()), float((grey >= BRIGHT_LEVEL).mean()))
        )

    def _compare_with_picture(self, frame: Frame, expected: Frame) -> None:
        if expected.shape == frame.shape:  # else the clip is larger than what was asked for
            self._against_picture = psnr_db(squared_error(frame, expected)), similarity(frame, expected)

    def finish(self) -> MeasuredClip:
        """The figures, after the last frame; there must have been one."""
        assert self._first is not None, "a clip has frames"
        motion = self._motion.finish()
        brightness, dark, bright = (float(value) for value in np.mean(self._levels, axis=0))
        measures = ClipMeasures(
            frames=len(self._levels),
            height=self._first.shape[0],
            width=self._first.shape[1],
            first_frame_psnr_db=self._against_picture[0],
            first_frame_ssim=self._against_picture[1],
            temporal_flickering=(255 - float(np.mean(self._changes))) / 255 if self._changes else None,
            motion_px=None if motion is None else motion.mean_px,
            motion_fastest_px=None if motion is None else motion.fastest_px,
            still_share=None if motion is None else motion.still_share,
            smoothness=None if motion is None else motion.smoothness,
            seam=seam(self._changes),
            sharpness=float(np.mean(self._sharpness)),
            sharpness_kept=self._sharpness[-1] / self._sharpness[0] if self._sharpness[0] > 0 else None,
            brightness=brightness,
            dark_share=dark,
            bright_share=bright,
            black=max(self._colour_means) <= BLACK_LEVEL,
            frozen=bool(self._from_first) and max(self._from_first) <= FROZEN_LEVEL,
        )
        by_pair = () if motion is None else motion.by_pair_px
        sheet = contact_sheet(self._thumbnails, SHEET_FRAMES)
        return MeasuredClip(measures, tuple(self._changes), by_pair, sheet)


def measure_clip(frames: Iterable[Frame], picture: Frame | None = None) -> MeasuredClip:
    """Of all frames, uint8 [H, W, 3] each. Raises what `frames` raises."""
    meter = ClipMeter(picture)
    for frame in frames:
        meter.add(frame)
    return meter.finish()


def seam(changes: Sequence[float]) -> float | None:
    """Of the changes between neighbouring frames: their mean at the borders of chunks over their median elsewhere,
    1 for no seam; None without a border, and where nothing changes at all. A change of less than SEAM_FLOOR elsewhere
    counts as that, so that a still clip that jumps at a border shows a large figure."""
    at_borders = [change for index, change in enumerate(changes, 1) if index % CHUNK_FRAMES == 0]
    elsewhere = [change for index, change in enumerate(changes, 1) if index % CHUNK_FRAMES != 0]
    if not at_borders or max(*at_borders, *elsewhere) <= SEAM_FLOOR:
        return None
    return float(np.mean(at_borders)) / max(float(np.median(elsewhere)), SEAM_FLOOR)


def mean_difference(frame: Frame, other: Frame) -> float:
    """Mean absolute difference of two frames, in levels."""
    return float(cv2.absdiff(frame, other).mean(dtype=np.float64))


def squared_error(frame: Frame, other: Frame) -> float:
    """Mean squared difference of two frames, in levels."""
    difference: NDArray[np.int32] = cv2.absdiff(frame, other).astype(np.int32)
    return float(np.square(difference).mean(dtype=np.float64))


def similarity(frame: Frame, other: Frame) -> float:
    """SSIM of the grey frames, -1 to 1, with the Gaussian window of its authors (Wang et al., 2004)."""
    first, second = (cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in (frame, other))
    value = structural_similarity(
        first, second, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(value)
