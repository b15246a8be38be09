"""Colour profiles: pictures whose profile is not sRGB, as phones make them (Display P3), are converted to sRGB."""

from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image, ImageCms

# Profiles named sRGB differ by a level or two in rounding and in the darkest tones: these pictures stay as they are.
SRGB_TOLERANCE: Final = 2
SRGB: Final = "sRGB"


@dataclass(frozen=True)
class ToSrgb:
    """`description` is for people: "sRGB", "Display P3, converted to sRGB", "a profile of GRAY, ignored"."""

    description: str
    _transform: ImageCms.ImageCmsTransform | None = None

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Mode RGB -> mode RGB."""
        if self._transform is None:
            return picture
        converted = ImageCms.applyTransform(picture, self._transform)
        return picture if converted is None else converted  # None: only when it works in place


def to_srgb(profile: bytes | None) -> ToSrgb:
    """What to do with a picture that carries this ICC profile. Only profiles of RGB are followed; one of another kind,
    or one that cannot be read, never refuses a picture. The intent is relative colorimetric with black point
    compensation, as in browsers."""
    if profile is None:
        return ToSrgb(SRGB)
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != "RGB":
            return ToSrgb(f"a profile of {space}, ignored")
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            "RGB",
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        name = (ImageCms.getProfileDescription(source) or "").strip() or "a profile without a name"
    except (ImageCms.PyCMSError, OSError, ValueError):
        return ToSrgb("a profile that cannot be read, ignored")
    lattice = _lattice()
    converted = ImageCms.applyTransform(lattice, transform)
    if converted is None or _distance(lattice, converted) <= SRGB_TOLERANCE:
        return ToSrgb(SRGB)
    return ToSrgb(f"{_printable(name)}, converted to sRGB", transform)


def _lattice() -> Image.Image:
    """All colours of 18 levels per channel, 0 to 255."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    return Image.fromarray(np.ascontiguousarray(colours.reshape(len(levels), -1, 3)))


def _distance(first: Image.Image, second: Image.Image) -> int:
    """The largest difference in levels."""
    return int(np.abs(np.asarray(first).astype(np.int16) - np.asarray(second)).max())


def _printable(name: str) -> str:
    """A caller's text, for the report: printable ASCII, at most 60 characters."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in name[:60])
