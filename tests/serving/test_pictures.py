"""Pictures as people send them, through the real server: what REPORT says of them, and which are refused by name."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serving.calls import Refused, Server, Values, report_of
from tests.video.profiles import P3, display_profile


def with_options(picture: bytes, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        image.save(file, kind, **options)
    return file.getvalue()


def test_a_motion_photo_gives_the_bits_of_its_picture(server: Server, small: Values, picture: bytes) -> None:
    photo = with_options(picture, "JPEG")
    film = np.random.default_rng(1).bytes(1 << 20)
    plain, motion = (server.stream_result({**small, "IMAGE": image}) for image in (photo, photo + film))
    np.testing.assert_array_equal(plain["LATENTS"], motion["LATENTS"])
    expected = {"format": "JPEG", "width": 144, "height": 96, "colours": "sRGB"}
    assert report_of(motion)["image"] == expected


def test_metadata_that_cannot_be_read_change_nothing(server: Server, small: Values, shared: Path) -> None:
    for name in ("exif-broken", "ztxt-3mb"):
        data = (shared / f"cases/{name}.png").read_bytes()
        assert report_of(server.stream_result({**small, "IMAGE": data}))["image"]["format"] == "PNG"


def test_the_report_says_that_colours_were_converted(server: Server, small: Values, picture: bytes) -> None:
    image = with_options(picture, "PNG", icc_profile=display_profile(P3, "Display P3"))
    answer = server.stream_result({**small, "IMAGE": image})
    assert report_of(answer)["image"]["colours"] == "Display P3, converted to sRGB"
    plain = server.stream_result(small)
    assert not np.array_equal(plain["LATENTS"], answer["LATENTS"])


def test_what_is_no_picture_is_named(server: Server, small: Values, picture: bytes) -> None:
    text = base64.b64encode(picture)
    named = {
        text: "a PNG file as base64 text",
        b"data:image/png;base64," + text: "a data URI",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "a HEIC file",
    }
    for data, name in named.items():
        with pytest.raises(Refused, match=f"INVALID_ARGUMENT: IMAGE must be the bytes of .* got {name} of"):
            server.grpc({**small, "IMAGE": data})
