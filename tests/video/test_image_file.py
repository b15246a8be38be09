"""What a picture file holds besides its pixels: none of it refuses a picture or takes memory; what is needed is read.

One test per kind of metadata in each format: whole pictures whose metadata are broken, huge or foreign give pixels.
"""

import base64
import resource
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.video.image import decode_image
from stepvideo_serve.video.image_file import MAX_PARTS, exif_orientation, read_image_file
from tests.video.test_image import gradient, riff_chunk, saved

BROKEN_EXIF = b"MM\0*\0\0\0\x08\xff\xff" + bytes(30)  # a directory of 65,535 entries, of which it holds two
BOMB = zlib.compress(bytes(64 << 20), 9)  # 64 MiB in 64 KiB
NAMES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


def png_chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(name + body) if checksum is None else checksum
    return len(body).to_bytes(4, "big") + name + body + crc.to_bytes(4, "big")


def with_png_chunk(chunk: bytes) -> bytes:
    data = saved(gradient(), "PNG")
    return data[:33] + chunk + data[33:]  # behind IHDR


def with_jpeg_segment(code: int, body: bytes) -> bytes:
    data = saved(gradient(), "JPEG")
    return data[:2] + bytes([0xFF, code]) + (len(body) + 2).to_bytes(2, "big") + body + data[2:]


def with_webp_chunk(name: bytes, body: bytes, flag: int) -> bytes:
    picture = saved(gradient(), "WEBP", lossless=True)[12:]
    size = b"".join((side - 1).to_bytes(3, "little") for side in gradient().size)
    chunks = riff_chunk(b"VP8X", bytes([flag, 0, 0, 0]) + size) + picture + riff_chunk(name, body)
    return riff_chunk(b"RIFF", b"WEBP" + chunks)


WITH_METADATA: dict[str, bytes] = {
    "png-exif": with_png_chunk(png_chunk(b"eXIf", BROKEN_EXIF)),
    "png-exif-no-tiff": with_png_chunk(png_chunk(b"eXIf", b"nonsense")),
    "png-profile": with_png_chunk(png_chunk(b"iCCP", b"name\0\0" + b"not deflated")),
    "png-profile-bomb": with_png_chunk(png_chunk(b"iCCP", b"name\0\0" + BOMB)),
    "png-text-bomb": with_png_chunk(png_chunk(b"zTXt", b"workflow\0\0" + BOMB)),
    "png-itxt-bomb": with_png_chunk(png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + BOMB)),
    "png-raw-exif-bomb": with_png_chunk(png_chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB)),
    "png-checksum-of-text": with_png_chunk(png_chunk(b"tEXt", b"Title\0cat", checksum=1)),
    "png-time": with_png_chunk(png_chunk(b"tIME", b"?")),
    "png-physical": with_png_chunk(png_chunk(b"pHYs", b"?")),
    "png-behind-the-end": saved(gradient(), "PNG") + bytes(1 << 20),
    "jpeg-exif": with_jpeg_segment(0xE1, b"Exif\0\0" + BROKEN_EXIF),
    "jpeg-profile": with_jpeg_segment(0xE2, b"ICC_PROFILE\0\1\1nonsense"),
    "jpeg-photoshop": with_jpeg_segment(0xED, b"Photoshop 3.0\x008BIM" + bytes(3)),
    "jpeg-pictures": with_jpeg_segment(0xE2, b"MPF\0MM\0*" + bytes(3)),
    "jpeg-comment": with_jpeg_segment(0xFE, b"\xff\xda" * 1000),
    "webp-exif": with_webp_chunk(b"EXIF", BROKEN_EXIF, 0x08),
    "webp-profile": with_webp_chunk(b"ICCP", b"nonsense", 0x20),
    "webp-xmp": with_webp_chunk(b"XMP ", b"<x:xmpmeta", 0x04),
    "webp-flags-without-chunks": with_webp_chunk(b"JUNK", b"", 0x2C),
    "webp-behind-the-end": saved(gradient(), "WEBP", lossless=True) + bytes(1 << 20),
}


@pytest.mark.parametrize("name", WITH_METADATA)
def test_metadata_never_decide(name: str) -> None:
    plain = saved(gradient(), "JPEG") if name.startswith("jpeg") else saved(gradient(), "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoded = decode_image(WITH_METADATA[name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB
    np.testing.assert_array_equal(np.array(decoded), np.array(decode_image(plain)))


@pytest.mark.parametrize("name", ["exif-broken", "raw-profile-broken", "itxt-3mb", "ztxt-3mb"])
def test_the_cases_that_were_refused(shared: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (shared / f"cases/{name}.png").read_bytes()
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 8 << 20)  # for the reference
    with Image.open(BytesIO(data)) as picture:
        expected = np.array(picture.convert("RGB"))
    np.testing.assert_array_equal(np.array(decode_image(data)), expected)


@pytest.mark.parametrize("mebibytes", [2, 8, 16])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_motion_photo_is_its_picture(progressive: bool, mebibytes: int) -> None:
    """Random bytes hold a scan's marker every 64 KiB; what is behind the end of the picture is no part of it."""
    picture = saved(gradient(), "JPEG", progressive=progressive)
    film = np.random.default_rng(mebibytes).bytes(mebibytes << 20)
    assert film.count(b"\xff\xda") > 20
    np.testing.assert_array_equal(np.array(decode_image(picture + film)), np.array(decode_image(picture)))


def test_scans_are_counted_by_structure() -> None:
    assert read_image_file(saved(gradient(), "JPEG")).scans == 1
    thumbnail = saved(gradient(), "JPEG", progressive=True)
    assert read_image_file(with_jpeg_segment(0xE1, b"Exif\0\0" + thumbnail)).scans == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (base64.b64encode(saved(gradient(), "PNG")), "a PNG file as base64 text of"),
        (base64.b64encode(saved(gradient(), "JPEG")), "a JPEG file as base64 text of"),
        (base64.b64encode(saved(gradient(), "WEBP")), "a WebP file as base64 text of"),
        (b"data:image/png;base64," + base64.b64encode(saved(gradient(), "PNG")), "a data URI of"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC file of 24 bytes"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "a HEIC file of 24 bytes"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "an AVIF file of 24 bytes"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isomavc1", "a video file of 24 bytes"),
        (b"https://example.org/cat.png", "a URL of 27 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer of 55 bytes"),
        (saved(gradient(), "GIF"), "a GIF file of"),
        (saved(gradient(), "TIFF"), "a TIFF file of"),
    ],
)
def test_the_refusal_names_what_came(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^IMAGE must be .* got {message}.*: .*(decode|convert|send|fetch) "):
        decode_image(data)


@pytest.mark.parametrize(
    "data",
    [
        saved(gradient(), "PNG")[:33] + png_chunk(b"IDAT", b"") * MAX_PARTS,
        saved(gradient(), "JPEG")[:2] + b"\xff\xfe\0\2" * (MAX_PARTS + 1),
        riff_chunk(b"RIFF", b"WEBP" + riff_chunk(b"JUNK", b"") * (MAX_PARTS + 1)),
    ],
    ids=["png", "jpeg", "webp"],
)
def test_endless_parts_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match=f"at most {MAX_PARTS} "):
        decode_image(data)


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
RAW = b"\nexif\n      " + str(len(TURNED)).encode() + b"\n" + TURNED.hex().encode() + b"\n"
TURNING: dict[str, bytes] = {
    "png-exif": with_png_chunk(png_chunk(b"eXIf", TURNED)),
    "png-raw": with_png_chunk(png_chunk(b"tEXt", b"Raw profile type exif\0" + RAW)),
    "png-raw-deflated": with_png_chunk(png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW))),
    "png-xmp": with_png_chunk(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "jpeg-exif": with_jpeg_segment(0xE1, b"Exif\0\0" + TURNED),
    "jpeg-xmp": with_jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
    "webp-exif": with_webp_chunk(b"EXIF", b"Exif\0\0" + TURNED, 0x08),
    "webp-xmp": with_webp_chunk(b"XMP ", XMP, 0x04),
}


@pytest.mark.parametrize("name", TURNING)
def test_the_orientation_is_read_wherever_it_stands(name: str) -> None:
    assert read_image_file(TURNING[name]).orientation == 6
    assert decode_image(TURNING[name]).size == gradient().size[::-1]


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_of_exif(order: str) -> None:
    def block(value: int, kind: int = 3, count: int = 1) -> bytes:
        entry = struct.pack(f"{order}HHIHH", 0x0112, kind, count, value, 0)
        return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 1) + entry

    assert [exif_orientation(block(value)) for value in (0, 1, 8, 9)] == [None, 1, 8, None]
    assert exif_orientation(block(6, count=2)) is None
    assert all(exif_orientation(block(6)[:length]) is None for length in range(20))


def profile(kind: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes()  # type: ignore[arg-type]


def jpeg_with_profile(parts: list[bytes]) -> bytes:
    data = saved(gradient(), "JPEG")
    segments = [b"ICC_PROFILE\0" + bytes([i + 1, len(parts)]) + part for i, part in enumerate(parts)]
    written = [b"\xff\xe2" + (len(body) + 2).to_bytes(2, "big") + body for body in reversed(segments)]
    return data[:2] + b"".join(written) + data[2:]


def test_a_profile_is_read_from_each_format() -> None:
    icc = profile("sRGB")
    for kind in NAMES:
        assert read_image_file(saved(gradient(), kind, icc_profile=icc)).profile == icc
    assert read_image_file(jpeg_with_profile([icc[:100], icc[100:300], icc[300:]])).profile == icc


def grey_png(bits: int, rows: list[list[int]], key: int) -> bytes:
    """Greyscale of `bits` per sample, width a multiple of 8, with one transparent level."""
    packed = b"".join(
        b"\0" + int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(len(row) * bits // 8, "big")
        for row in rows
    )
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    return png_file(header, png_chunk(b"tRNS", key.to_bytes(2, "big")), packed)


def png_file(header: bytes, transparent: bytes, rows: bytes) -> bytes:
    chunks = (
        png_chunk(b"IHDR", header) + transparent + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_becomes_white(bits: int) -> None:
    most = 2**bits - 1
    levels = [0, most, most // 3, most // 5, 1, most - 1, most // 2, most]
    for key in {0, most // 3, most}:
        decoded = np.array(decode_image(grey_png(bits, [levels], key)))[0, :, 0]
        expected = [255 if level == key else level * 255 // most if bits < 16 else level >> 8 for level in levels]
        assert decoded.tolist() == expected


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_becomes_white(bits: int) -> None:
    most = 2**bits - 1
    key = (most - 1, most // 3, 5)
    near = [(most - 1, most // 3, 4), (most - 2, most // 3, 5), (most - 1, most // 3 + 1, 5)]
    pixels = np.array([key, *near, key], ">u2" if bits == 16 else "u1")
    transparent = png_chunk(b"tRNS", struct.pack(">HHH", *key))
    data = png_file(struct.pack(">IIBBBBB", 5, 1, bits, 2, 0, 0, 0), transparent, b"\0" + pixels.tobytes())
    expected = (pixels >> 8 if bits == 16 else pixels).astype(np.uint8)
    expected[[0, 4]] = 255
    np.testing.assert_array_equal(np.array(decode_image(data))[0], expected)


def test_a_transparent_colour_of_16_bits_is_found_in_every_row() -> None:
    """The rows are filtered, as encoders do: filters work on bytes of whole pixels."""
    rows = np.random.default_rng(3).integers(0, 65536, (8, 5, 3)).astype(">u2")
    rows[:, 2] = (1, 2, 3)
    filtered = b""
    for y, row in enumerate(rows):
        above = np.frombuffer(rows[y - 1].tobytes(), np.uint8) if y else np.zeros(30, np.uint8)
        filtered += b"\2" + (np.frombuffer(row.tobytes(), np.uint8) - above).astype(np.uint8).tobytes()
    data = png_file(
        struct.pack(">IIBBBBB", 5, 8, 16, 2, 0, 0, 0), png_chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)), filtered
    )
    expected = (rows >> 8).astype(np.uint8)
    expected[:, 2] = 255
    np.testing.assert_array_equal(np.array(decode_image(data)), expected)
