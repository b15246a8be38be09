"""How a clip moves, by optical flow (OpenCV's DIS).

Flow is found on grey frames whose longer side is at most FLOW_SIDE_PX, and told in pixels of the video. It shows that
something moves and how evenly, not whether that is what the prompt says.
"""

from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from stepvideo_client.evaluation.video import Frame

FLOW_SIDE_PX: Final = 512
STILL_PX: Final = 0.1
"""A pair of frames in which the fastest pixels move less than this, is still."""
FASTEST_SHARE: Final = 0.05
"""Of the pixels; as VBench tells a clip's dynamic degree by the fastest 5 %."""
SMALLEST_SIDE_PX: Final = 16  # DIS refuses smaller pictures

Flow = NDArray[np.float32]


@dataclass(frozen=True)
class Motion:
    """Of a clip with two frames at least. Pixels are those of the video, between neighbouring frames.

    mean_px      mean over all pixels and pairs
    fastest_px   mean over pairs of that of the fastest 5 % of the pixels
    still_share  the part of the pairs that are still, 0 to 1
    smoothness   1 - |f_(t+1) - f_t| / (|f_(t+1)| + |f_t|), means over pixels and pairs: 1 for a motion that stays as it
                 is, 0 for one that stops and goes; None without two pairs, and where nothing moves
    by_pair_px   the mean of each pair
    """

    mean_px: float
    fastest_px: float
    still_share: float
    smoothness: float | None
    by_pair_px: tuple[float, ...]


class MotionMeter:
    """Takes a clip's frames in order."""

    def __init__(self) -> None:
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._last: NDArray[np.uint8] | None = None
        self._last_flow: Flow | None = None
        self._means: list[float] = []
        self._fastest: list[float] = []
        self._changes, self._sums = 0.0, 0.0

    def add(self, frame: Frame) -> None:
        """The next frame, uint8 [H, W, 3]."""
        grey, scale = _grey(frame)
        if self._last is not None:
            flow = self._flow.calc(self._last, grey, None)  # type: ignore[call-overload]  # its stubs know no None
            self._add_flow(np.asarray(flow, np.float32) * scale)
        self._last = grey

    def finish(self) -> Motion | None:
        """None for a clip of one frame."""
        if not self._means:
            return None
        still = [value < STILL_PX for value in self._fastest]
        moves = self._sums > 0 and not all(still)
        return Motion(
            mean_px=float(np.mean(self._means)),
            fastest_px=float(np.mean(self._fastest)),
            still_share=float(np.mean(still)),
            smoothness=1 - self._changes / self._sums if moves else None,
            by_pair_px=tuple(self._means),
        )

    def _add_flow(self, flow: Flow) -> None:
        """flow: [h, w, 2], pixels of the video."""
        speed = _length(flow)
        count = max(round(FASTEST_SHARE * speed.size), 1)
        self._means.append(float(speed.mean()))
        self._fastest.append(float(np.partition(speed.ravel(), -count)[-count:].mean()))
        if self._last_flow is not None:
            self._changes += float(_length(flow - self._last_flow).mean())
            self._sums += self._means[-1] + self._means[-2]
        self._last_flow = flow


def _length(flow: Flow) -> NDArray[np.float32]:
    length: NDArray[np.float32] = np.sqrt(np.square(flow).sum(axis=-1))
    return length


def _grey(frame: Frame) -> tuple[NDArray[np.uint8], float]:
    """The frame that flow is found on, and how many pixels of the video one of its pixels is wide."""
    grey: NDArray[Any] = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    height, width = grey.shape
    scale = max(max(height, width) / FLOW_SIDE_PX, 1.0)
    if scale > 1:
        sides = (max(round(width / scale), SMALLEST_SIDE_PX), max(round(height / scale), SMALLEST_SIDE_PX))
        grey = cv2.resize(grey, sides, interpolation=cv2.INTER_AREA)
    return grey.astype(np.uint8), scale
