"""The bound on what pictures take while they are decoded: real threads, real pictures."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from stepvideo_serve.errors import InvalidRequest, RequestCancelled
from stepvideo_serve.video.decoding_room import ROOM_BYTES, DecodingRoom
from stepvideo_serve.video.image import (
    EXACT_PIXELS,
    MAX_SCANNED_PIXELS,
    STRIP_PIXELS,
    decode_image,
    fit_image,
    fit_image_file,
)
from stepvideo_serve.video.image_file import read_image_file
from tests.video.test_image import gradient, saved

ROOT = Path(__file__).resolve().parents[2]
MEASURE = """
import re, sys
from contextlib import contextmanager
from pathlib import Path
from stepvideo_serve.video.image import fit_image_file

def kib(what): return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

@contextmanager
def room(amount):
    print(amount)
    yield

small, *others = map(Path, sys.argv[1:])
fit_image_file(small.read_bytes(), 544, 992)
for path in others:
    data = path.read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    before = kib("VmRSS")
    fit_image_file(data, 544, 992, room)
    print((kib("VmHWM") - before) << 10)
"""


def nothing() -> None:
    """The caller is there."""


def test_requests_wait_until_there_is_room() -> None:
    room = DecodingRoom(100)
    inside, most, lock = 0, 0, threading.Lock()

    def decode() -> None:
        nonlocal inside, most
        with room.hold(40, nothing):
            with lock:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=decode) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (inside, most) == (0, 2)


def test_a_large_picture_is_not_overtaken_for_ever_and_may_be_alone() -> None:
    room = DecodingRoom(100)
    order: list[str] = []

    def decode(name: str, amount: int) -> None:
        with room.hold(amount, nothing):
            order.append(name)

    with room.hold(50, nothing):
        large = threading.Thread(target=decode, args=("large", 1000))
        large.start()
        threading.Event().wait(0.2)
        small = threading.Thread(target=decode, args=("small", 1))
        small.start()
        threading.Event().wait(0.2)
        assert order == []
    large.join(10)
    small.join(10)
    assert order == ["large", "small"]


def test_who_gives_up_leaves_no_trace() -> None:
    room = DecodingRoom(100)

    def leave() -> None:
        raise RequestCancelled("The request was cancelled by its caller.")

    with room.hold(100, nothing), pytest.raises(RequestCancelled), room.hold(1, leave):
        pass
    with room.hold(100, leave):  # at once, without a look
        pass


def blank(width: int = 4000, height: int = 4000, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height))


LARGE: dict[str, Callable[[], bytes]] = {
    "rgba.png": lambda: saved(blank(mode="RGBA"), "PNG"),
    "tall.png": lambda: saved(blank(1000, 16000), "PNG"),
    "grey16.png": lambda: saved(Image.fromarray(np.zeros((4000, 4000), np.uint16)), "PNG", transparency=3),
    "photo.webp": lambda: saved(blank(), "WEBP", method=0),
    "scans.jpg": lambda: saved(blank(), "JPEG", progressive=True, subsampling=0),
    "large.jpg": lambda: saved(blank(8000, 4000), "JPEG"),
}


def test_a_picture_takes_no_more_than_it_says(tmp_path: Path) -> None:
    """The peak of a process of its own, beyond what it has after a small picture."""
    files = [tmp_path / name for name in ("small.png", *LARGE)]
    for path, make in zip(files, [lambda: saved(gradient(), "PNG"), *LARGE.values()], strict=True):
        path.write_bytes(make())
    command = [sys.executable, "-c", MEASURE, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    figures = [int(line) for line in done.stdout.split()]
    for name, said, taken in zip(LARGE, figures[::2], figures[1::2], strict=True):
        assert taken <= said <= ROOM_BYTES, name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_strips_give_the_bits_of_the_whole(orientation: int) -> None:
    rng = np.random.default_rng(orientation)
    picture = Image.fromarray(rng.integers(0, 256, (1700, 1300, 3), np.uint8))
    assert 2 * STRIP_PIXELS < 1700 * 1300
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(picture, "PNG", exif=exif.tobytes(), compress_level=1)
    for size in ((64, 112), (96, 64)):
        assert torch.equal(fit_image_file(data, *size).pixels, whole_at_once(decode_image(data), *size))


def whole_at_once(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """The official preprocessing, all of the picture in fp32."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div(255).mul(2).sub(1)
    scale = height / image.height if image.width / image.height >= width / height else width / image.width
    scaled = round(image.height * scale), round(image.width * scale)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    resized = torch.nn.functional.interpolate(pixels, scaled, mode="bilinear", align_corners=False, antialias=True)
    return resized[0, :, top : top + height, left : left + width]


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_a_fraction(orientation: int) -> None:
    picture = gradient(16, 12).resize((6400, 4800), Image.Resampling.BICUBIC)
    assert EXACT_PIXELS < 6400 * 4800
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(picture, "JPEG", exif=exif.tobytes())
    taken: list[int] = []

    @contextmanager
    def room(amount: int) -> Iterator[None]:
        taken.append(amount)
        yield

    fitted = fit_image_file(data, 544, 992, room)
    sides = (6400, 4800) if orientation == 1 else (4800, 6400)
    facts: dict[str, Any] = {"width": sides[0], "height": sides[1], "decoded_at": f"{sides[0] // 2}x{sides[1] // 2}"}
    assert {name: fitted.report[name] for name in facts} == facts
    assert taken[0] < 6400 * 4800 * 8
    exact = fit_image(decode_image(data), 544, 992)
    assert (fitted.pixels - exact).abs().max() < 2 / 127.5  # two grey levels, on a smooth picture


def test_scans_are_allowed_by_their_work() -> None:
    """A progressive JPEG of few pixels may have many scans, one of 16 megapixels 64."""
    data = saved(blank(), "JPEG", progressive=True)
    last, scans = data.rindex(b"\xff\xda"), read_image_file(data).scans
    allowed = MAX_SCANNED_PIXELS // 4000**2
    assert allowed == 64
    with pytest.raises(InvalidRequest, match=f"at most {allowed} JPEG scans at 4000x4000, got {allowed + 1}"):
        decode_image(data[:last] + data[last:-2] * (allowed + 2 - scans) + data[-2:])
