"""Pictures with a colour profile: converted to sRGB, against the formulas; those of sRGB are left alone to the bit."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from stepvideo_serve.video.colours import to_srgb
from stepvideo_serve.video.image import decode_image, fit_image_file
from tests.video.profiles import P3, SRGB, display_profile
from tests.video.test_image import saved

DISPLAY_P3 = display_profile(P3, "Display P3")


def skin_tones() -> Image.Image:
    """Colours of skin from dark to light, and greys."""
    rows = [(74, 48, 38), (141, 94, 72), (198, 144, 118), (224, 172, 148), (255, 224, 205), (0, 0, 0), (128, 128, 128)]
    return Image.fromarray(np.array([rows] * 7, np.uint8))


def p3_in_srgb(colours: NDArray[np.uint8]) -> NDArray[Any]:
    """By the definition of both spaces, in levels."""
    x = colours / 255.0
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    converted = np.clip(linear @ np.array(P3) @ np.linalg.inv(np.array(SRGB)), 0, 1)
    return 255 * np.where(converted <= 0.0031308, converted * 12.92, 1.055 * converted ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_display_p3_is_converted(kind: str) -> None:
    picture = skin_tones()
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = np.array(decode_image(saved(picture, kind, icc_profile=DISPLAY_P3, **options))).astype(float)
    expected = p3_in_srgb(np.array(picture))
    assert np.abs(decoded - expected).max() <= 1.5
    assert np.abs(decoded - np.array(picture)).max() > 8, "the picture must change by what the spaces differ"


def test_the_report_says_so() -> None:
    report = fit_image_file(saved(skin_tones(), "JPEG", icc_profile=DISPLAY_P3), 64, 64).report
    assert report == {"format": "JPEG", "width": 7, "height": 7, "colours": "Display P3, converted to sRGB"}
    assert fit_image_file(saved(skin_tones(), "PNG"), 64, 64).report["colours"] == "sRGB"


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        display_profile(SRGB, "any name at all"),
        display_profile(P3, "Display P3")[:200],
        display_profile(P3, "a grey profile", space=b"GRAY"),
        b"nonsense",
    ],
    ids=["sRGB", "sRGB by another name", "cut", "grey", "nonsense"],
)
def test_other_pictures_keep_their_pixels(profile: bytes) -> None:
    picture = skin_tones()
    decoded = decode_image(saved(picture, "PNG", icc_profile=profile))
    np.testing.assert_array_equal(np.array(decoded), np.array(picture))


def test_a_description_is_short_and_printable() -> None:
    described = to_srgb(display_profile(P3, "\x1b[31m\u202e" + "x" * 200)).description
    assert described.isprintable()
    assert described.isascii()
    assert len(described) < 90


def test_palettes_greys_and_transparency_are_converted_too() -> None:
    picture = skin_tones()
    expected = np.array(decode_image(saved(picture, "PNG", icc_profile=DISPLAY_P3)))
    for mode in ("P", "RGBA"):
        converted = picture.convert(mode, palette=Image.Palette.ADAPTIVE)
        decoded = np.array(decode_image(saved(converted, "PNG", icc_profile=DISPLAY_P3)))
        np.testing.assert_array_equal(decoded, expected)
