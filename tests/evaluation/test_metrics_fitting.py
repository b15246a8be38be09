"""The client fits a picture as the server does."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.first_picture import fit, fitted_picture, has_plain_colours, read_picture
from stepvideo_serve.video.image import decode_image, fit_image_file
from stepvideo_serve.video.mp4 import to_uint8
from tests.evaluation.synthetic import Frame, texture


def served(content: bytes, height: int, width: int) -> Frame:
    frames = to_uint8(fit_image_file(content, height, width).pixels[None])
    return np.asarray(frames[0], np.uint8)


def saved(picture: Image.Image, path: Path, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[path.suffix], **options)
    path.write_bytes(file.getvalue())
    return file.getvalue()


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width"),
    [
        (300, 500, 64, 96),
        (500, 300, 64, 96),
        (64, 96, 64, 96),
        (40, 50, 128, 192),
        (777, 1234, 544, 992),
        (97, 991, 48, 32),
    ],
)
def test_scaled_and_cropped_alike(tmp_path: Path, rows: int, columns: int, height: int, width: int) -> None:
    content = saved(Image.fromarray(texture(rows, columns)), tmp_path / "a.png")
    expected, found = served(content, height, width), fitted_picture(tmp_path / "a.png", height, width)
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_files_are_read_alike(tmp_path: Path) -> None:
    """Turned by EXIF, transparent, grey of 8 and 16 bits, with a palette and a transparent colour, WebP."""
    colours = Image.fromarray(texture(60, 90))
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 90).astype(np.uint8), (60, 1)))
    see_through = colours.copy()
    see_through.putalpha(alpha)
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray((np.asarray(colours.convert("L")).astype(np.uint16) << 8) + 37)
    palette = colours.quantize(16)
    files = {
        "turned.jpg": saved(colours, tmp_path / "turned.jpg", exif=turned, quality=95),
        "alpha.png": saved(see_through, tmp_path / "alpha.png"),
        "alpha.webp": saved(see_through, tmp_path / "alpha.webp", lossless=True),
        "grey.png": saved(colours.convert("L"), tmp_path / "grey.png"),
        "grey_alpha.png": saved(see_through.convert("LA"), tmp_path / "grey_alpha.png"),
        "deep.png": saved(deep, tmp_path / "deep.png"),
        "palette.png": saved(palette, tmp_path / "palette.png", transparency=3),
    }
    for name, content in files.items():
        difference = np.abs(read_picture(tmp_path / name).astype(int) - np.asarray(decode_image(content)).astype(int))
        assert difference.max() <= 1, name
    assert read_picture(tmp_path / "turned.jpg").shape == (90, 60, 3)


def test_pairs_of_the_evaluation_set(shared: Path) -> None:
    for path in sorted((shared / "eval").glob("*.png"))[:2]:
        difference = np.abs(fitted_picture(path, 112, 192).astype(int) - served(path.read_bytes(), 112, 192))
        assert difference.max() <= 1


def test_the_middle_is_kept() -> None:
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, 95:205] = 255
    assert fit(picture, 50, 50).min() == 255


@pytest.mark.parametrize("content", [b"", b"no picture", b"GIF89a"])
def test_what_is_no_picture_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"must be a PNG, JPEG or WebP file, got: "):
        read_picture(tmp_path / "a.png")
    with pytest.raises(InvalidInput, match="No such file"):
        read_picture(tmp_path / "none.png")


def test_pictures_whose_colours_the_server_converted_are_not_compared(tmp_path: Path) -> None:
    """Without a REPORT (over a gateway) those with a profile are left out, whatever it says."""
    plain, tagged = tmp_path / "plain.png", tmp_path / "tagged.png"
    saved(Image.fromarray(texture(8, 8)), plain)
    saved(
        Image.fromarray(texture(8, 8)),
        tagged,
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    )
    for path in (plain, tagged):
        assert has_plain_colours({"image": {"colours": "sRGB"}}, path)
        assert not has_plain_colours({"image": {"colours": "Display P3, converted to sRGB"}}, path)
    assert has_plain_colours({}, plain)
    assert not has_plain_colours({}, tagged)
    plain.write_bytes(b"no picture")
    with pytest.raises(InvalidInput, match="must be a PNG, JPEG or WebP file"):
        has_plain_colours({}, plain)
