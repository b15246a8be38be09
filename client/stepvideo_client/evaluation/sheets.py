"""Contact sheets: a few frames of a clip, small, in one row, as a JPEG."""

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np

from stepvideo_client.errors import ClientError
from stepvideo_client.evaluation.video import Frame

THUMBNAIL_PX: Final = 160  # of the longer side
JPEG_QUALITY: Final = 80


def thumbnail(frame: Frame) -> Frame:
    """The frame with THUMBNAIL_PX at most on its longer side."""
    height, width = frame.shape[:2]
    scale = THUMBNAIL_PX / max(height, width)
    if scale >= 1:
        return frame
    sides = (max(round(width * scale), 1), max(round(height * scale), 1))
    small: Frame = np.asarray(cv2.resize(frame, sides, interpolation=cv2.INTER_AREA), np.uint8)
    return small


def contact_sheet(thumbnails: Sequence[Frame], count: int) -> bytes:
    """A JPEG of at most `count` of these [h, w, 3], evenly spaced, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(thumbnails) - 1, min(count, len(thumbnails))).round().astype(int))
    row = np.concatenate([thumbnails[index] for index in chosen], axis=1)
    done, data = cv2.imencode(".jpg", cv2.cvtColor(row, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise ClientError("A contact sheet must be encodable as JPEG, OpenCV did not: install its wheel anew.")
    return data.tobytes()
