"""The bytes of a picture file, taken apart: what decides the pixels, and the little metadata that is needed.

Only the parts that decide the pixels reach a decoder. Of the metadata the orientation and the colour profile are read
here, in bounded memory; metadata that is damaged, too large or of no use never refuses a picture, and what stands
behind a picture's end (the film of a "motion photo") is not looked at.
"""

import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from stepvideo_serve.errors import InvalidRequest

# Each part costs time here. A PNG of 32 MiB in pieces of 1 KiB has 32,768 parts; a JPEG's are mostly 64 KiB.
MAX_PARTS: Final = 50_000
MAX_METADATA_BYTES: Final = 4 << 20  # inflated; a display's profile has some KiB, the largest with tables about 2 MiB

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_JPEG: Final = b"\xff\xd8\xff"
# Not 0xFF00, which stands for a byte 0xFF, and not the restart markers, which belong to a scan.
_JPEG_MARKER: Final = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_ADOBE_AND_JFIF: Final = (0xE0, 0xEE)  # they say how colours are stored
_XMP_ORIENTATION: Final = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|>)\s*([1-8])""")
_EXIF_ORIENTATION: Final = 0x0112
_BRANDS: Final = {
    "a HEIC file": (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"),
    "an AVIF file": (b"avif", b"avis"),
}
# How data begin -> what they are: what callers send by mistake.
_OTHER_FILES: Final = {
    b"GIF8": "a GIF file",
    b"II*\0": "a TIFF file",
    b"MM\0*": "a TIFF file",
    b"%PDF": "a PDF file",
    b"\0\0\0\x0cJXL ": "a JPEG XL file",
    b"\xff\x0a": "a JPEG XL file",
    b"<svg": "an SVG file",
}
_REFERENCES: Final = {
    b"http://": "a URL",
    b"https://": "a URL",
    b"version https://git-lfs": "a Git LFS pointer",
}
_IN_BASE64: Final = {b"iVBORw0KGgo": "a PNG", b"/9j/": "a JPEG", b"UklGR": "a WebP", b"AAAA": "a HEIC, AVIF or MP4"}


@dataclass
class ImageFile:
    """`kind` is PNG, JPEG or WebP. `essence` is the file without its metadata. `orientation` as in EXIF, 1..8;
    `profile` an ICC profile; `scans` of a JPEG; `frames` of a PNG; `colour_key` the content of a PNG's tRNS, `bits` per
    sample."""

    kind: str
    essence: bytes = b""
    orientation: int = 1
    profile: bytes | None = None
    scans: int = 0
    frames: int = 1
    bits: int = 8
    colour_key: bytes | None = None
    _profile_parts: dict[int, bytes] = field(default_factory=dict)


def read_image_file(data: bytes) -> ImageFile:
    """Raises InvalidRequest, naming what came, for anything but a PNG, JPEG or WebP file, and for one in more than
    MAX_PARTS parts. A file that ends early is left to the decoder."""
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(_JPEG):
        return _jpeg(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if not data:
        raise InvalidRequest("IMAGE must be a PNG, JPEG or WebP file, got 0 bytes: send the bytes of the file.")
    what, remedy = _named(data)
    raise InvalidRequest(f"IMAGE must be the bytes of a PNG, JPEG or WebP file, got {what}: {remedy}.")


def _named(data: bytes) -> tuple[str, str]:
    """What the bytes are, and what to do."""
    start = data[:64].lstrip()
    if start[:5].lower() == b"data:":
        return f"a data URI of {len(data)} bytes", "decode the base64 text behind its comma and send these bytes"
    if name := _by_beginning(start, _IN_BASE64):
        return f"{name} file as base64 text of {len(data)} bytes", "decode the text and send these bytes"
    if name := _by_beginning(start, _REFERENCES):
        return f"{name} of {len(data)} bytes", "fetch the picture and send its bytes"
    convert = "convert it to PNG, JPEG or WebP"
    if data[4:8] == b"ftyp":
        name = next((name for name, brands in _BRANDS.items() if data[8:12] in brands), None)
        return f"{name or 'a video file'} of {len(data)} bytes", convert if name else "send one frame of it"
    name = _by_beginning(start, _OTHER_FILES)
    return (f"{name} of {len(data)} bytes" if name else f"{len(data)} bytes of something else"), convert


def _by_beginning(data: bytes, names: Mapping[bytes, str]) -> str | None:
    return next((name for beginning, name in names.items() if data.startswith(beginning)), None)


def _png(data: bytes) -> ImageFile:
    """Keeps the critical chunks (their names begin with a capital letter) and tRNS."""
    file = ImageFile("PNG", bits=data[24] if len(data) > 24 else 8)
    kept = [_PNG]
    exif: bytes | None = None
    xmp = b""
    for name, start, begin, end in _png_chunks(data):
        body = memoryview(data)[begin:end]
        if name[:1].isupper() or name == b"tRNS":
            kept.append(data[start : end + 4])
            file.colour_key = bytes(body) if name == b"tRNS" else file.colour_key
        elif name == b"acTL" and len(body) >= 4:
            file.frames = max(int.from_bytes(body[:4], "big"), 1)
        elif name == b"eXIf" and exif is None:
            exif = bytes(body[:MAX_METADATA_BYTES])
        elif name == b"iCCP" and file.profile is None:
            file.profile = _inflated(_after_name(body)[1:])
        elif name in (b"tEXt", b"zTXt") and bytes(body[:21]) == b"Raw profile type exif" and exif is None:
            exif = _raw_exif(name, body)
        elif name == b"iTXt" and bytes(body[:17]) == b"XML:com.adobe.xmp":
            xmp = bytes(body[:MAX_METADATA_BYTES])
    file.essence = b"".join(kept)
    file.orientation = _orientation(exif, xmp)
    return file


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, where the chunk starts, where its body begins and ends; up to IEND. The last may be cut off."""
    at = len(_PNG)
    for _ in _counted("PNG chunks"):
        if at + 8 > len(data):
            return
        name, begin = data[at + 4 : at + 8], at + 8
        end = begin + int.from_bytes(data[at : at + 4], "big")
        yield name, at, begin, end
        if name == b"IEND":
            return
        at = end + 4


def _jpeg(data: bytes) -> ImageFile:
    """Keeps everything up to the picture's end but comments and application segments other than JFIF's and Adobe's."""
    file = ImageFile("JPEG")
    kept = [data[:2]]
    exif: bytes | None = None
    xmp = b""
    for code, start, begin, end in _jpeg_segments(data):
        body = data[begin : min(end, begin + 0xFFFF)]
        file.scans += code == 0xDA
        if code == 0xE1 and body.startswith(b"Exif\0") and exif is None:
            exif = body
        elif code == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or body
        elif code == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            file._profile_parts.setdefault(body[12], body[14:])
        if code in _ADOBE_AND_JFIF or not (0xE0 <= code <= 0xEF or code == 0xFE):
            kept.append(data[start:end])
    file.essence = b"".join(kept)
    file.orientation = _orientation(exif, xmp)
    file.profile = b"".join(part for _, part in sorted(file._profile_parts.items())) or None
    return file


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Marker, where the segment starts, where its body begins and where it ends, a scan with its data; up to the end
    of the picture. What stands between segments is skipped, as decoders do."""
    at = 2
    for _ in _counted("JPEG segments"):
        found = _JPEG_MARKER.search(data, at)
        if found is None:
            return
        code, start, begin = found[1][0], found.start(), found.end()
        if code in (0x01, 0xD8, 0xD9):  # no body
            yield code, start, begin, begin
            at = begin
            if code == 0xD9:
                return
            continue
        at = begin + max(int.from_bytes(data[begin : begin + 2], "big"), 2)
        if code == 0xDA:
            following = _JPEG_MARKER.search(data, at)
            at = len(data) if following is None else following.start()
        yield code, start, begin + 2, at


def _webp(data: bytes) -> ImageFile:
    """Keeps all chunks but ICCP, EXIF and XMP; the header's flags for these are cleared."""
    file = ImageFile("WebP")
    size = int.from_bytes(data[4:8], "little")
    if size + 8 > len(data):  # cut off: for the decoder to say
        file.essence = data
        return file
    kept = []
    exif: bytes | None = None
    xmp, at, last = b"", 12, min(size + 8, len(data))
    for _ in _counted("WebP chunks"):
        if at + 8 > last:
            break
        name, begin = data[at : at + 4], at + 8
        end = begin + int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[begin : min(end, begin + MAX_METADATA_BYTES)] if name in (b"ICCP", b"EXIF", b"XMP ") else b""
        following = end + (end & 1)
        if name == b"ICCP":
            file.profile = file.profile or body
        elif name == b"EXIF":
            exif = body if exif is None else exif
        elif name == b"XMP ":
            xmp = xmp or body
        elif name == b"VP8X":
            kept.append(data[at:begin] + bytes([data[begin] & 0b11010011]) + data[begin + 1 : following])
        else:
            kept.append(data[at:following])
        at = following
    chunks = b"".join(kept)
    file.essence = b"RIFF" + (4 + len(chunks)).to_bytes(4, "little") + b"WEBP" + chunks
    file.orientation = _orientation(exif, xmp)
    return file


def _counted(what: str) -> Iterator[int]:
    """0 .. MAX_PARTS - 1. Raises InvalidRequest when more are asked for."""
    yield from range(MAX_PARTS)
    raise InvalidRequest(f"IMAGE must have at most {MAX_PARTS} {what}, got more: save it again as an ordinary file.")


def _orientation(exif: bytes | None, xmp: bytes) -> int:
    """From EXIF, else from XMP, else 1."""
    if exif is not None and (found := exif_orientation(exif.removeprefix(b"Exif\0\0"))) is not None:
        return found
    match = _XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else 1


def exif_orientation(tiff: bytes) -> int | None:
    """The orientation, 1..8, in the first directory of an EXIF block; None where the block has none or is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    try:
        if order is None:
            return None
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, at)
        for index in range(entries):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, at + 2 + 12 * index)
            if tag == _EXIF_ORIENTATION and kind in (3, 4) and count == 1:
                (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), tiff, at + 10 + 12 * index)
                return int(value) if 1 <= value <= 8 else None
    except struct.error:  # the block ends early
        return None
    return None


def _after_name(body: memoryview) -> bytes:
    """What follows the name and its zero byte, at the beginning of a chunk; a name has at most 79 bytes."""
    return bytes(body[bytes(body[:80]).find(b"\0") + 1 :])


def _inflated(packed: bytes) -> bytes | None:
    """None for data that are damaged or have more than MAX_METADATA_BYTES."""
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(packed, MAX_METADATA_BYTES)
    except zlib.error:
        return None
    return plain if inflater.eof else None


def _raw_exif(name: bytes, body: memoryview) -> bytes | None:
    """EXIF that ImageMagick writes as text: name, length and hexadecimal digits on lines of their own."""
    limited = bytes(body[22 : 22 + MAX_METADATA_BYTES])
    text = limited if name == b"tEXt" else _inflated(limited[1:])
    try:
        return None if text is None else bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    except ValueError:
        return None
