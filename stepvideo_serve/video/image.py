"""IMAGE bytes -> RGB picture -> the pixels that the VAE encoder takes.

The bytes are treated as hostile: the size is read from the header before anything is decoded, and whatever is wrong
with the file becomes an InvalidRequest of one sentence. Fitting reproduces the official preprocessing, a strip of the
picture at a time, so that little more memory is needed than the decoder's own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile as Decoder
from torch.nn import functional

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.video.colours import ToSrgb, to_srgb
from stepvideo_serve.video.image_file import ImageFile, read_image_file

MAX_IMAGE_PIXELS: Final = 64_000_000
MAX_ASPECT: Final = 16  # longer side / shorter side: bounds the scaled picture before the crop
# A scan of a progressive JPEG may take a few bytes and costs a pass over the whole picture; real files have about 10.
MAX_JPEG_SCANS: Final = 100
MAX_SCANNED_PIXELS: Final = 16 * MAX_IMAGE_PIXELS
EXACT_PIXELS: Final = 16_000_000  # a larger JPEG is decoded at 1/2, 1/4 or 1/8, at twice the size needed or more
STRIP_PIXELS: Final = 1_000_000

_WHITE: Final = (255, 255, 255, 255)
_TURN: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BYTES_PER_PIXEL: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2}  # other modes: 4
_WEBP_COPIES: Final = 4  # the decoder's two canvases, the frame handed over, the picture
_STRIP_BYTES: Final = 128 * STRIP_PIXELS  # the forms that a strip goes through

T = TypeVar("T")
MakeRoom = Callable[[int], AbstractContextManager[object]]


@dataclass(frozen=True)
class FittedImage:
    """`pixels` fp32 [3, H, W] in [-1, 1]; `report` says what the file was and what was done with it."""

    pixels: torch.Tensor
    report: dict[str, Any]


def decode_image(data: bytes) -> Image.Image:
    """The picture as mode RGB, upright.

    PNG, JPEG and WebP only, told apart by content. Transparency is flattened onto white, greyscale and palettes are
    expanded, 16-bit samples keep their high byte, the EXIF orientation is applied, colours are converted from the
    file's profile to sRGB. Of a JPEG with several pictures (MPO, as phones write) the first counts.
    Raises InvalidRequest when the data are empty, truncated, not such a file, animated, CMYK, above MAX_IMAGE_PIXELS,
    longer than MAX_ASPECT to one, or have more scans than MAX_JPEG_SCANS and MAX_SCANNED_PIXELS allow.
    """
    return _reading(data, lambda: _opened(data).loaded().strip(0, None))


def fit_image_file(data: bytes, height: int, width: int, room: MakeRoom = nullcontext) -> FittedImage:
    """decode_image and fit_image in one, in less memory: the picture is never whole in a second form. `room(bytes)` is
    entered before anything is decoded, with the most that decoding and fitting will take. Errors as decode_image."""
    picture = _reading(data, lambda: _opened(data))
    scaled = _scaled_size(picture.size, height, width)
    picture.shrink(scaled)
    with room(picture.peak_bytes(scaled, width)):
        pixels = _reading(data, lambda: _fitted(picture.loaded(), scaled, height, width))
    return FittedImage(pixels, picture.report)


def fit_image(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Scale to cover height x width and crop the centre: fp32 [3, height, width] in [-1, 1].

    Bilinear with antialias; scaled by height if the picture is at least as wide as the target, else by width; crop
    offsets rounded down. Source: the official `resize_to_desired_aspect_ratio`.
    """
    picture = Picture(ImageFile("in memory"), image)
    return _fitted(picture, _scaled_size(image.size, height, width), height, width)


class Picture:
    """A picture of which upright RGB strips can be had once it is loaded."""

    def __init__(self, file: ImageFile, stored: Image.Image, colours: ToSrgb | None = None) -> None:
        self._file, self._stored = file, stored
        self._colours = colours or to_srgb(None)
        self._low_bytes: Image.Image | None = None
        self._full = stored.size
        sides = stored.size[::-1] if file.orientation >= 5 else stored.size
        self.report = {"format": file.kind, "width": sides[0], "height": sides[1], "colours": self._colours.description}

    @property
    def size(self) -> tuple[int, int]:
        """Upright width and height, in pixels."""
        width, height = self._stored.size
        return (height, width) if self._file.orientation >= 5 else (width, height)

    def shrink(self, scaled: tuple[int, int]) -> None:
        """Lets a large JPEG be decoded at a fraction of its size that is at least twice `scaled` (height, width)."""
        if isinstance(self._stored, JpegImagePlugin.JpegImageFile) and self._full[0] * self._full[1] > EXACT_PIXELS:
            wanted = scaled if self._file.orientation >= 5 else scaled[::-1]
            self._stored.draft(None, (2 * wanted[0], 2 * wanted[1]))
            self.report["decoded_at"] = f"{self.size[0]}x{self.size[1]}"

    def peak_bytes(self, scaled: tuple[int, int], width: int) -> int:
        """The most that decoding takes, and fitting to `width` by way of `scaled` (height, width)."""
        pixels = self._stored.width * self._stored.height
        decoded = pixels * _BYTES_PER_PIXEL.get(self._stored.mode, 4)
        if self._file.kind == "WebP":
            decoded *= _WEBP_COPIES
        if self._file.scans > 1:  # the coefficients of all components, 16 bits each, at the full size
            decoded += self._full[0] * self._full[1] * 2 * len(self._stored.getbands())
        if self._keyed_by_16_bits():
            decoded *= 2
        return decoded + 4 * width * (3 * self.size[1] + 2 * scaled[0]) + _STRIP_BYTES

    def loaded(self) -> "Picture":
        """This picture, decoded. Raises whatever the decoder raises."""
        if self._keyed_by_16_bits():
            # Pillow keeps the high byte of a sample; read as of the other byte order, the low byte is the high one.
            low = PngImagePlugin.PngImageFile(BytesIO(self._file.essence))
            low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
            low.load()
            self._low_bytes = low
        self._stored.load()
        return self

    def strip(self, top: int, bottom: int | None) -> Image.Image:
        """Rows top .. bottom - 1 (None: to the end) of the upright picture, as RGB."""
        width, height = self.size
        box = self._stored_box(top, height if bottom is None else bottom, width, height)
        part = self._colours(self._flattened(box))
        return part.transpose(_TURN[self._file.orientation]) if self._file.orientation in _TURN else part

    def _stored_box(self, top: int, bottom: int, width: int, height: int) -> tuple[int, int, int, int]:
        """Where upright rows are in the picture as it is stored: left, upper, right, lower."""
        if self._file.orientation in (3, 4, 7, 8):  # the rows come from the other end
            top, bottom = height - bottom, height - top
        return (top, 0, bottom, width) if self._file.orientation >= 5 else (0, top, width, bottom)

    def _flattened(self, box: tuple[int, int, int, int]) -> Image.Image:
        """RGB: 16-bit greyscale by its high byte, transparency onto white."""
        part = self._stored.crop(box)
        if part.mode.startswith("I;16"):
            samples = np.asarray(part)
            grey = (samples >> 8).astype(np.uint8)
            grey[self._is_key(samples)] = 255
            return Image.fromarray(grey).convert("RGB")
        if self._file.colour_key is not None and part.mode in ("1", "L", "RGB"):
            low = None if self._low_bytes is None else np.asarray(self._low_bytes.crop(box))
            colours = np.array(part.convert("RGB"))
            colours[self._is_key_8_bits(part, low)] = 255
            return Image.fromarray(colours)
        if "A" not in part.getbands() and "transparency" not in part.info:
            return part.convert("RGB")
        layer = part.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer).convert("RGB")

    def _is_key(self, samples: NDArray[Any]) -> NDArray[np.bool_]:
        """Where greyscale samples of 16 bits are the transparent one."""
        key = self._key()
        return np.zeros(samples.shape, bool) if key is None else samples == key[0]

    def _is_key_8_bits(self, part: Image.Image, low: NDArray[Any] | None) -> NDArray[np.bool_]:
        """Where a picture of mode 1, L or RGB has the transparent colour. The decoder has spread samples of 1, 2 and 4
        bits over 0 .. 255; `low` has the low bytes of samples of 16 bits."""
        key = self._key()
        samples = np.asarray(part.convert("L") if part.mode == "1" else part)
        if key is None or key.size != (3 if part.mode == "RGB" else 1):
            return np.zeros(samples.shape[:2], bool)
        if low is not None:
            same = (samples == key >> 8) & (low == (key & 0xFF))
        else:
            same = samples == key * (255 // (2**self._file.bits - 1))
        return np.asarray(same if same.ndim == 2 else same.all(axis=2), bool)

    def _key(self) -> NDArray[np.uint16] | None:
        """The samples of the transparent colour; only their low `bits` count."""
        if self._file.colour_key is None or len(self._file.colour_key) not in (2, 6):
            return None
        return np.frombuffer(self._file.colour_key, ">u2").astype(np.uint16) & np.uint16(2**self._file.bits - 1)

    def _keyed_by_16_bits(self) -> bool:
        return self._file.colour_key is not None and self._file.bits == 16 and self._stored.mode == "RGB"


def _reading(data: bytes, read: Callable[[], T]) -> T:
    """What `read` gives. Raises InvalidRequest for whatever it raises."""
    try:
        return read()
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


def _opened(data: bytes) -> Picture:
    """The file with its header read and checked, and nothing decoded.

    The format classes are called directly: `Image.open` would add a warning about large pictures and try other formats.
    """
    file = read_image_file(data)
    content = BytesIO(file.essence)
    stored: Decoder
    if file.kind == "PNG":
        stored = PngImagePlugin.PngImageFile(content)
    elif file.kind == "JPEG":
        stored = JpegImagePlugin.JpegImageFile(content)
    else:
        stored = WebPImagePlugin.WebPImageFile(content)
    _check_header(file, stored)
    return Picture(file, stored, to_srgb(file.profile))


def _check_header(file: ImageFile, stored: Decoder) -> None:
    width, height = stored.size
    if width * height > MAX_IMAGE_PIXELS:
        raise InvalidRequest(f"IMAGE must have at most {MAX_IMAGE_PIXELS} pixels, got {width}x{height}: scale it down.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidRequest(
            f"IMAGE must be at most {MAX_ASPECT} times as long as it is wide, got {width}x{height}: crop it."
        )
    allowed = min(MAX_JPEG_SCANS, MAX_SCANNED_PIXELS // (width * height))
    if file.scans > allowed:
        raise InvalidRequest(
            f"IMAGE must have at most {allowed} JPEG scans at {width}x{height}, got {file.scans}: "
            "save it again as an ordinary JPEG."
        )
    if (frames := max(file.frames, getattr(stored, "n_frames", 1))) > 1:
        raise InvalidRequest(f"IMAGE must be a still picture, got an animation of {frames} frames: send one frame.")
    if stored.mode == "CMYK":
        raise InvalidRequest("IMAGE must be RGB or greyscale, got a CMYK JPEG: convert it to RGB.")


def _scaled_size(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Height and width to which a picture of `size` (width, height) is scaled before the crop."""
    scale = height / size[1] if size[0] / size[1] >= width / height else width / size[0]
    return round(size[1] * scale), round(size[0] * scale)


def _fitted(picture: Picture, scaled: tuple[int, int], height: int, width: int) -> torch.Tensor:
    """Scaled to (height, width) `scaled` and cropped. Columns first and then rows, as the whole picture would be: each
    row of the first pass depends on its own row only, so strips give the same bits."""
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    columns, rows = picture.size
    narrow = torch.empty(3, rows, width)
    step = max(STRIP_PIXELS // max(columns, scaled[1]), 1)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        strip = torch.from_numpy(np.array(picture.strip(begin, end))).permute(2, 0, 1)[None]
        pixels = strip.to(torch.float32).div_(255).mul_(2).sub_(1)
        resized = _resized(pixels, (end - begin, scaled[1]))
        narrow[:, begin:end] = resized[0, :, :, left : left + width]
    return torch.cat(
        [_resized(channel[None, None], (scaled[0], width))[0, :, top : top + height] for channel in narrow]
    )


def _resized(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return functional.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
