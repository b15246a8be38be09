"""IMAGE bytes -> RGB picture -> the pixels that the VAE encoder takes.

`decode_image` treats its bytes as hostile: the size is read from the header before anything is decoded, and whatever is
wrong with the file becomes an InvalidRequest of one sentence. `fit_image` reproduces the official preprocessing.
"""

from io import BytesIO
from typing import Final

import numpy as np
import torch
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile
from torch.nn import functional

from stepvideo_serve.errors import InvalidRequest

MAX_IMAGE_PIXELS: Final = 64_000_000
MAX_ASPECT: Final = 16  # longer side / shorter side: bounds the scaled picture before the crop
# A scan of a progressive JPEG may take a few bytes and costs a pass over the whole picture; real files have about 10.
MAX_JPEG_SCANS: Final = 100

_JPEG_SCAN: Final = b"\xff\xda"
_WHITE: Final = (255, 255, 255, 255)

_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes) -> Image.Image:
    """The picture as mode RGB, upright.

    PNG, JPEG and WebP only, told apart by content. Transparency is flattened onto white, greyscale and palettes are
    expanded, 16-bit samples keep their high byte, the EXIF orientation is applied, colour profiles are ignored (as in
    the official code). Of a JPEG with several pictures (MPO, as phones write) the first counts.
    Raises InvalidRequest when the data are empty, truncated, not such a file, animated, CMYK, above MAX_IMAGE_PIXELS or
    longer than MAX_ASPECT to one.
    """
    if not data:
        raise InvalidRequest("IMAGE must be a PNG, JPEG or WebP file, got 0 bytes: send the bytes of the file.")
    try:
        with _opened(data) as picture:
            _check_header(picture)
            picture.load()
            return _upright(_flattened(picture), picture.getexif().get(ExifTags.Base.Orientation, 1))
    except InvalidRequest:
        raise
    except Image.DecompressionBombError as error:
        raise InvalidRequest(
            f"IMAGE must have at most {MAX_IMAGE_PIXELS} pixels, got more than twice that: scale it down."
        ) from error
    # Decoders answer damaged files with a dozen exception types (OSError, SyntaxError, struct.error, zlib.error, ...).
    except Exception as error:
        raise InvalidRequest(
            f"IMAGE must be a complete PNG, JPEG or WebP file, got {len(data)} bytes that cannot be decoded "
            f"({type(error).__name__}): save it again and send the whole file."
        ) from error


def fit_image(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Scale to cover height x width and crop the centre: fp32 [3, height, width] in [-1, 1].

    Bilinear with antialias; scaled by height if the picture is at least as wide as the target, else by width; crop
    offsets rounded down. Source: the official `resize_to_desired_aspect_ratio`.
    """
    scale = height / image.height if image.width / image.height >= width / height else width / image.width
    scaled = (round(image.height * scale), round(image.width * scale))
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    channels = []
    for band in image.getchannel("R"), image.getchannel("G"), image.getchannel("B"):  # one at a time: 64 megapixels
        pixels = torch.from_numpy(np.array(band)[None, None]).to(torch.float32).div_(255).mul_(2).sub_(1)
        resized = functional.interpolate(pixels, scaled, mode="bilinear", align_corners=False, antialias=True)
        channels.append(resized[0, 0, top : top + height, left : left + width])
    return torch.stack(channels)


def _opened(data: bytes) -> ImageFile:
    """The file with its header read and nothing decoded.

    The format classes are called directly: `Image.open` would add a warning about large pictures and try other formats.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile(BytesIO(data))
    if data.startswith(b"\xff\xd8\xff"):
        if (scans := data.count(_JPEG_SCAN)) > MAX_JPEG_SCANS:
            raise InvalidRequest(
                f"IMAGE must have at most {MAX_JPEG_SCANS} JPEG scans, got {scans}: save it again as an ordinary JPEG."
            )
        return JpegImagePlugin.JpegImageFile(BytesIO(data))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(BytesIO(data))
    raise InvalidRequest(
        f"IMAGE must be a PNG, JPEG or WebP file, got {len(data)} bytes of something else: convert it to one of these."
    )


def _check_header(picture: ImageFile) -> None:
    width, height = picture.size
    if width * height > MAX_IMAGE_PIXELS:
        raise InvalidRequest(f"IMAGE must have at most {MAX_IMAGE_PIXELS} pixels, got {width}x{height}: scale it down.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidRequest(
            f"IMAGE must be at most {MAX_ASPECT} times as long as it is wide, got {width}x{height}: crop it."
        )
    if (frames := getattr(picture, "n_frames", 1)) > 1:
        raise InvalidRequest(f"IMAGE must be a still picture, got an animation of {frames} frames: send one frame.")
    if picture.mode == "CMYK":
        raise InvalidRequest("IMAGE must be RGB or greyscale, got a CMYK JPEG: convert it to RGB.")


def _flattened(picture: Image.Image) -> Image.Image:
    """RGB: 16-bit greyscale by its high byte, transparency onto white."""
    if picture.mode.startswith("I;16"):
        samples = np.array(picture)
        grey = (samples >> 8).astype(np.uint8)
        if "transparency" in picture.info:
            grey[samples == picture.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer).convert("RGB")


def _upright(picture: Image.Image, orientation: object) -> Image.Image:
    """The picture turned as its EXIF orientation says; values outside 2..8 mean it is upright already."""
    for value, method in _UPRIGHT.items():
        if orientation == value:
            return picture.transpose(method)
    return picture
