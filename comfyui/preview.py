"""The frames of a preview, and which of them is due: ComfyUI shows one picture at a time, so the node plays them."""

import base64
import io
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from PIL import Image, ImageSequence, UnidentifiedImageError

FORMATS = ("WEBP", "JPEG")
LEAST_S = 0.1  # that a frame is shown
DEFAULT_S = 0.2  # where the file does not say
MAX_FRAMES = 128


@dataclass(frozen=True)
class Preview:
    """Pictures, and when each ends, in seconds since the first one; at the end they begin again."""

    frames: tuple[Image.Image, ...]
    ends_s: tuple[float, ...]

    def at(self, since_s: float) -> int:
        """Which frame is due so many seconds after the preview came."""
        return bisect_right(self.ends_s, since_s % self.ends_s[-1])


def decoded(text: str) -> Preview | None:
    """A still or animated picture in base64; None where there is none: a preview is no reason to lose a video."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=FORMATS) as image:
            frames, lengths_s = [], []
            for frame in ImageSequence.Iterator(image):
                frames.append(frame.convert("RGB"))
                lengths_s.append(max(frame.info.get("duration", 0) / 1000 or DEFAULT_S, LEAST_S))
                if len(frames) == MAX_FRAMES:
                    break
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return Preview(tuple(frames), tuple(accumulate(lengths_s)))
