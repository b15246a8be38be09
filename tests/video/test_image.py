"""decode_image and fit_image: official pixels for good files, one sentence for all others."""

import resource
import zlib
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from safetensors.torch import load_file

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.video.image import MAX_JPEG_SCANS, decode_image, fit_image

FORMATS = ["PNG", "JPEG", "WEBP"]
SIGNATURES = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"RIFF\0\0\0\0WEBPVP8X"]


def gradient(width: int = 48, height: int = 32) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], axis=-1).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    target = BytesIO()
    image.save(target, format=kind, **options)
    return target.getvalue()


@pytest.mark.parametrize("size", [(64, 96), (64, 112)])
@pytest.mark.parametrize("name", ["landscape", "portrait", "square"])
def test_fitting_gives_the_official_pixels(shared: Path, name: str, size: tuple[int, int]) -> None:
    goldens = load_file(shared / "goldens/tiny-a/goldens.safetensors")
    expected = goldens[f"pre.{name}.{size[0]}x{size[1]}"][0]
    pixels = fit_image(decode_image((shared / f"goldens/tiny-a/images/{name}.png").read_bytes()), *size)
    assert pixels.dtype == torch.float32
    assert (pixels - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (16, 1), (1, 16), (333, 77), (97, 61), (992, 544)])
def test_fitting_fills_the_target(size: tuple[int, int]) -> None:
    pixels = fit_image(gradient(*size), 64, 112)
    assert pixels.shape == (3, 64, 112)
    assert pixels.abs().max() <= 1 + 1e-5


def test_lossless_files_keep_their_pixels() -> None:
    image = gradient()
    for data in (saved(image, "PNG"), saved(image, "WEBP", lossless=True), saved(image.convert("RGBA"), "PNG")):
        decoded = decode_image(data)
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(np.array(decoded), np.array(image))


def test_jpeg_comes_close() -> None:
    image = Image.new("RGB", (48, 32), (200, 100, 50))
    assert np.abs(np.array(decode_image(saved(image, "JPEG"))).astype(int) - np.array(image)).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(mode: str) -> None:
    image = gradient().convert(mode)
    np.testing.assert_array_equal(np.array(decode_image(saved(image, "PNG"))), np.array(image.convert("RGB")))


def test_sixteen_bits_keep_the_high_byte() -> None:
    samples = np.linspace(0, 65535, 48 * 32).astype(np.uint16).reshape(32, 48)
    decoded = np.array(decode_image(saved(Image.fromarray(samples), "PNG")))
    np.testing.assert_array_equal(decoded, np.repeat((samples >> 8)[..., None], 3, axis=-1))


def test_transparency_becomes_white() -> None:
    layer = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    palette = gradient(16, 16).convert("P")
    grey = Image.fromarray(np.full((16, 16), 300, np.uint16))
    for data in (saved(layer, "PNG"), saved(layer, "WEBP", lossless=True), saved(grey, "PNG", transparency=300)):
        assert np.array(decode_image(data)).min() == 255
    assert set(np.array(decode_image(saved(half, "PNG"))).ravel()) == {127}
    assert np.array(decode_image(saved(palette, "PNG", transparency=bytes(256)))).min() == 255


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24, 0], upright[16:, 24:, 1] = 255, 255  # red top left, green bottom right
    undo: dict[int, Callable[[Any], Any]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    decoded = np.array(decode_image(saved(stored, kind, exif=exif.tobytes()))).astype(int)
    assert decoded.shape == (32, 48, 3)
    assert np.abs(decoded - upright).mean() < 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got 0 bytes"),
        (b"hello", "5 bytes of something else"),
        (saved(gradient(), "GIF"), "a GIF file"),
        (saved(gradient(), "TIFF"), "a TIFF file"),
        (saved(gradient(), "JPEG")[:300], "cannot be decoded"),
        (saved(gradient(), "PNG")[:-40], "cannot be decoded"),
        (saved(gradient(), "WEBP")[:-10], "cannot be decoded"),
        (saved(gradient().convert("CMYK"), "JPEG"), "CMYK"),
        (saved(gradient(), "PNG", save_all=True, append_images=[gradient().rotate(90)]), "animation of 2 frames"),
        (saved(gradient(), "WEBP", save_all=True, append_images=[gradient().rotate(90)]), "animation of 2 frames"),
        (saved(Image.new("L", (1, 17)), "PNG"), "16 times as long as it is wide, got 1x17"),
    ],
)
def test_a_bad_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^IMAGE must .*{message}"):
        decode_image(data)


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data do not have."""
    data = bytearray(saved(Image.new("RGB", (1, 1)), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("RGB", (1, 1)), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def webp_header(width: int, height: int) -> bytes:
    """An animated WebP of a single 1x1 frame on a canvas of this size."""
    picture = saved(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = bytes(12) + (100).to_bytes(3, "little") + b"\0" + picture
    chunks = (b"VP8X", b"\x02\0\0\0" + canvas), (b"ANIM", bytes(6)), (b"ANMF", frame)
    return riff_chunk(b"RIFF", b"WEBP" + b"".join(riff_chunk(*chunk) for chunk in chunks))


def riff_chunk(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "little") + body + bytes(len(body) % 2)


@pytest.mark.parametrize("size", [(8001, 8000), (9500, 9500), (20_000, 20_000), (60_000, 60_000)])
@pytest.mark.parametrize("make", [png_header, jpeg_header, webp_header])
def test_a_huge_picture_is_refused_before_it_is_decoded(
    make: Callable[[int, int], bytes], size: tuple[int, int]
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest, match="at most 64000000 pixels"):
        decode_image(make(*size))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = saved(gradient(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert data.count(b"\xff\xda") <= 12
    assert decode_image(data).size == (48, 32)
    with pytest.raises(InvalidRequest, match=f"at most {MAX_JPEG_SCANS} JPEG scans at 48x32"):
        decode_image(data[:last] + data[last:-2] * MAX_JPEG_SCANS + data[-2:])


@cache
def samples() -> list[bytes]:
    image = gradient()
    return [
        saved(image, "PNG"),
        saved(image.convert("P"), "PNG", transparency=3),
        saved(image, "PNG", save_all=True, append_images=[image.rotate(90)]),
        saved(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        saved(image, "JPEG", progressive=True),
        saved(image, "WEBP"),
        saved(image.convert("RGBA"), "WEBP", lossless=True, exif=b"Exif\0\0"),
    ]


@settings(deadline=None)
@given(data=st.binary(max_size=200), prefix=st.sampled_from(SIGNATURES))
def test_random_bytes_raise_only_invalid_request(data: bytes, prefix: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_image(prefix + data)


@settings(deadline=None, max_examples=200)
@given(index=st.integers(0, 6), cut=st.floats(0, 1))
def test_a_truncated_file_is_refused_or_whole(index: int, cut: float) -> None:
    data = samples()[index]
    shortened = data[: int(cut * (len(data) - 1))]
    try:
        decoded = decode_image(shortened)
    except InvalidRequest:
        return
    np.testing.assert_array_equal(np.array(decoded), np.array(decode_image(data)))


@settings(deadline=None, max_examples=300)
@given(index=st.integers(0, 6), edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_file_raises_only_invalid_request(index: int, edits: list[tuple[float, int]]) -> None:
    data = bytearray(samples()[index])
    for position, value in edits:
        data[int(position * (len(data) - 1))] = value
    try:
        decoded = decode_image(bytes(data))
    except InvalidRequest:
        return
    assert decoded.mode == "RGB"
