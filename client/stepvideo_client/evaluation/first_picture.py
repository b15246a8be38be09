"""The picture of a request as the model was shown it: decoded, scaled to cover the size of the video, cropped.

The server does the same in stepvideo_serve/video/image.py; tests/evaluation/test_metrics_fitting.py compares both.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.video import Frame

SRGB: Final = "sRGB"
FORMATS: Final = ("PNG", "JPEG", "WEBP")


def fitted_picture(path: Path, height: int, width: int) -> Frame:
    """uint8 [height, width, 3]: what the first frame of a video of this size should be.

    Upright by its EXIF orientation, transparency on white, bilinear with antialias, centre crop. Colours are not
    converted from a profile (`has_plain_colours`). Raises InvalidInput when the file is no picture.
    """
    return fit(read_picture(path), height, width)


def has_plain_colours(report: Mapping[str, Any], path: Path) -> bool:
    """Whether the server, by its REPORT, used the picture's colours as they are: it converts profiles, and this does
    not, so that the first frames of such pictures cannot be compared here. Where REPORT does not tell, a picture
    without a profile was used as it is. Raises InvalidInput when the file is no picture."""
    image = report.get("image")
    if isinstance(image, Mapping):
        return bool(image.get("colours", SRGB) == SRGB)
    with _opened(path) as file:
        return "icc_profile" not in file.info


def read_picture(path: Path) -> Frame:
    """uint8 [H, W, 3], upright, flattened onto white. Raises InvalidInput."""
    with _opened(path) as file:
        return np.array(_rgb(ImageOps.exif_transpose(file)))


def fit(picture: Frame, height: int, width: int) -> Frame:
    """uint8 [H, W, 3] -> uint8 [height, width, 3], as the official pre-processing and its conversion to a frame do."""
    rows, columns = picture.shape[:2]
    scale = height / rows if columns / rows >= width / height else width / columns
    scaled = round(rows * scale), round(columns * scale)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    across = _resampling(columns, scaled[1])[left : left + width]
    down = _resampling(rows, scaled[0])[top : top + height]
    channels = np.ascontiguousarray(picture.transpose(2, 0, 1)).astype(np.float32) / 127.5 - 1
    fitted = np.stack([down @ (channel @ across.T) for channel in channels], axis=-1)
    levels: Frame = ((fitted.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return levels


def crop_centre(picture: Frame, height: int, width: int) -> Frame:
    """The centre [height, width, 3], as the server crops 544x992 to 540x960."""
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture; what is done with it inside raises InvalidInput when the file is damaged."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            yield file
    except Exception as error:  # decoders answer damaged files with a dozen exception types
        reason = getattr(error, "strerror", None) or f"it cannot be decoded ({type(error).__name__})"
        raise InvalidInput(f"The picture {str(path)!r} must be a PNG, JPEG or WebP file, got: {reason}.") from error


def _resampling(length: int, target: int) -> NDArray[np.float32]:
    """The weights [target, length] of bilinear interpolation with antialias: a triangle, as wide as a target pixel
    where there are fewer of these."""
    step = length / target
    reach = max(step, 1.0)
    middles = (np.arange(target) + 0.5) * step
    distance = np.abs(np.arange(length) + 0.5 - middles[:, None]) / reach
    weights = np.maximum(1 - distance, 0)
    scaled: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return scaled


def _rgb(picture: Image.Image) -> Image.Image:
    """8 bits, transparency on white; of 16-bit grey the high byte."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
