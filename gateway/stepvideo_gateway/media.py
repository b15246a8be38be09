"""What is made of a finished video: its thumbnail, its spritesheet, its last frame. Blocking: call it on a thread."""

import io
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import imageio_ffmpeg
from PIL import Image

MARK: Final = "AI-generated"
THUMBNAIL_SIDE: Final = 512
SHEET_COLUMNS, SHEET_ROWS, SHEET_SIDE = 5, 5, 240


def marked(content: bytes, settings: Mapping[str, Any]) -> bytes:
    """The mp4 with its settings, as JSON, and the mark "AI-generated" in its metadata; its pictures as they were.
    Raises ValueError where ffmpeg cannot read it."""
    with tempfile.TemporaryDirectory(prefix="stepvideo_gateway_") as folder:
        plain, result = Path(folder, "plain.mp4"), Path(folder, "marked.mp4")
        plain.write_bytes(content)
        tags = {"comment": json.dumps(settings, ensure_ascii=False), "description": MARK}
        metadata = [part for name, value in tags.items() for part in ("-metadata", f"{name}={value}")]
        line = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(plain), "-map", "0", "-c", "copy", *metadata]
        line += ["-movflags", "+faststart", str(result)]
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode != 0:
            raise ValueError(f"the video must be an mp4, ffmpeg says: {done.stderr.decode(errors='replace')[:200]}")
        return result.read_bytes()


def thumbnail(video: Path) -> bytes:
    """The first frame as WebP, its longer side at most THUMBNAIL_SIDE."""
    picture = next(frames(video))
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return _webp(picture)


def spritesheet(video: Path) -> bytes:
    """SHEET_COLUMNS x SHEET_ROWS frames, evenly spread over the video, as one WebP; the longer side of each is at most
    SHEET_SIDE."""
    every = list(frames(video))
    count = SHEET_COLUMNS * SHEET_ROWS
    picked = [every[index * (len(every) - 1) // (count - 1)] for index in range(count)]
    for picture in picked:
        picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
    width, height = picked[0].size
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, SHEET_ROWS * height))
    for index, picture in enumerate(picked):
        sheet.paste(picture, ((index % SHEET_COLUMNS) * width, (index // SHEET_COLUMNS) * height))
    return _webp(sheet)


def last_frame(video: Path) -> bytes:
    """The last frame as PNG: where an extension begins."""
    picture: Image.Image | None = None
    for picture in frames(video):  # noqa: B007  # the last one is wanted
        pass
    if picture is None:
        raise ValueError(f"{video.name} must have frames, found none")
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def frames(video: Path) -> Iterator[Image.Image]:
    """All frames, in RGB. Raises ValueError for a file that is no video."""
    line = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(video), "-f", "image2pipe", "-c:v", "ppm", "-"]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as ffmpeg:
        assert ffmpeg.stdout is not None
        try:
            while (size := _size(ffmpeg.stdout)) is not None:
                width, height = size
                yield Image.frombytes("RGB", size, ffmpeg.stdout.read(width * height * 3))
        finally:
            ffmpeg.kill()


def _size(stream: IO[bytes]) -> tuple[int, int] | None:
    """Width and height in the header of a PPM; None at the end. Raises ValueError for anything else."""
    if not (kind := stream.readline()):
        return None
    width, height = stream.readline().split()
    if kind != b"P6\n" or stream.readline() != b"255\n":
        raise ValueError("ffmpeg must write PPM pictures of 8 bits, it wrote something else")
    return int(width), int(height)


def _webp(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=80)
    return out.getvalue()
