"""The inputs of nodes: addresses and keys, requests and their keys, pictures, prompts, previews and texts."""

import io

import pytest
import torch
from PIL import Image

from comfyui.address import DEFAULT_URL, address_of
from comfyui.camera import MOVEMENTS, NONE, with_camera
from comfyui.errors import BadInput
from comfyui.preview import decoded
from comfyui.report import quote_of, report_of, span
from comfyui.request import DEFAULT_QUALITY, Request, blank_png, fields_of, png_of, video_fields
from tests.comfyui.unit.scripted import DONE, animation, picture, request, text_of

OWN = {"STEPVIDEO_URL": "https://videos.example.org/", "STEPVIDEO_API_KEY": "own-key"}
COST = {
    "width": 992,
    "height": 544,
    "num_frames": 102,
    "steps": 50,
    "guidance": 9.0,
    "shift": 7.0,
    "quality": DEFAULT_QUALITY,
    "other_preset": "",
    "priority": "normal",
}


@pytest.mark.parametrize(
    ("url", "environment", "expected"),
    [
        ("", {}, DEFAULT_URL),
        ("", OWN, "https://videos.example.org"),
        (" http://host:8010/ ", OWN, "http://host:8010"),
        ("http://host/step/v1", {}, "http://host/step"),
    ],
)
def test_the_address(url: str, environment: dict[str, str], expected: str) -> None:
    assert address_of(url, "", 60.0, environment).url == expected


@pytest.mark.parametrize("url", ["host:8010", "ftp://host", "http://", "http://host:port", "http://host:99999"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(BadInput, match="url must be the gateway's address such as http"):
        address_of(url, "", 60.0, {})


def test_a_key_of_the_environment_goes_to_its_address_only() -> None:
    assert address_of("", "", 60.0, OWN).key == "own-key"
    assert address_of("https://videos.example.org", "", 60.0, OWN).key == "own-key"
    assert address_of("https://elsewhere.example.org", "", 60.0, OWN).key == ""
    assert address_of("https://elsewhere.example.org", " typed ", 60.0, OWN).key == "typed"
    assert address_of("", "", 60.0, {"STEPVIDEO_API_KEY": "own-key"}).key == "own-key"


def test_a_key_is_not_shown_and_is_no_other_header() -> None:
    assert "typed" not in repr(address_of("", "typed", 60.0, {}))
    with pytest.raises(BadInput, match="api_key must be printable ASCII"):
        address_of("", "a\r\nx-other: b", 60.0, {})


def test_the_fields_of_a_request() -> None:
    common = fields_of(**COST)  # type: ignore[arg-type]
    fields = video_fields(common, "a cat", " ", 2.5, 7)
    assert fields == {
        "size": "992x544",
        "num_frames": "102",
        "num_inference_steps": "50",
        "guidance_scale": "9",
        "flow_shift": "7",
        "priority": "normal",
        "prompt": "a cat",
        "motion_score": "2.5",
        "seed": "7",
        "preview_format": "webp",
    }
    assert video_fields(common, "a cat", "no dog", 5.0, 7)["negative_prompt"] == "no dog"
    assert fields_of(**COST | {"quality": "fast"})["quality"] == "fast"  # type: ignore[arg-type]
    assert fields_of(**COST | {"quality": "fast", "other_preset": " night "})["quality"] == "night"  # type: ignore[arg-type]


def test_a_prompt_is_needed() -> None:
    with pytest.raises(BadInput, match="prompt must say what happens"):
        video_fields({}, " \n", "", 5.0, 7)


def test_the_key_is_the_same_for_the_same_video_only() -> None:
    assert request().key == request().key
    assert request().key == Request(dict(reversed(list(request().fields.items()))), picture()).key
    others = {request(seed="8").key, request(prompt="a dog").key, Request(request().fields, picture(0.6)).key}
    assert len(others | {request().key}) == 4
    assert len(request().key) <= 255


@pytest.mark.parametrize("channels", [3, 4])
def test_a_picture_becomes_png_exactly(channels: int) -> None:
    levels = torch.randint(0, 256, (2, 5, 7, channels), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with Image.open(io.BytesIO(png_of(levels / 255))) as image:
        assert image.size == (7, 5)
        assert image.tobytes() == levels[0].numpy().tobytes()


def test_what_is_no_batch_of_pictures() -> None:
    with pytest.raises(BadInput, match=r"with a picture, got \[0, 8, 8, 3\]"):
        png_of(torch.zeros(0, 8, 8, 3))
    with pytest.raises(BadInput, match=r"with a picture, got \[1, 8, 8\]"):
        png_of(torch.zeros(1, 8, 8))


def test_the_picture_of_a_quote_is_a_picture() -> None:
    with Image.open(io.BytesIO(blank_png())) as image:
        assert (image.format, image.size) == ("PNG", (16, 16))


def test_a_camera_movement_is_the_last_clause() -> None:
    assert with_camera("a cat", NONE) == "a cat"
    assert with_camera("a cat", "zoom-in") == "a cat，镜头放大。"
    assert with_camera("A cat. ", "fixed") == "A cat. 固定镜头。"
    assert with_camera("一只猫。", "orbit") == "一只猫。镜头环绕。"
    assert with_camera("", "fixed") == "固定镜头。"
    assert NONE not in MOVEMENTS


def test_a_preview_has_its_frames_and_their_times() -> None:
    preview = decoded(text_of(animation(0, 100, 200, milliseconds=250)))
    assert preview is not None
    assert [frame.getpixel((0, 0)) for frame in preview.frames] == [(grey,) * 3 for grey in (0, 100, 200)]
    assert [preview.at(since_s) for since_s in (0.0, 0.2, 0.3, 0.6, 0.8, 7.5)] == [0, 0, 1, 2, 0, 0]
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "JPEG")
    still = decoded(text_of(file.getvalue()))
    assert still is not None
    assert (len(still.frames), still.at(123.4)) == (1, 0)


def test_the_report() -> None:
    fields = {"num_frames": "17", "num_inference_steps": "4", "quality": "fast"}
    assert report_of(DONE, fields, "http://host", False).splitlines() == [
        "96x64, 17 frames, 0.68 s, seed 7",
        "steps 4, quality fast",
        "v1 at http://host, took 12 s with its wait",
    ]
    assert report_of(DONE, fields, "http://host", True).endswith("it was there already")


def test_the_quote() -> None:
    quote = {"seconds": 300.0, "wait_s": 40.2, "jobs_waiting": 2}
    assert quote_of(quote) == "5 min of work, begins in about 40 s (2 wait)"
    assert quote_of({"seconds": 0.1, "wait_s": 0}) == "1 s of work, begins in about 1 s (nobody waits)"
    assert [span(seconds) for seconds in (119, 120, 7199, 7200)] == ["119 s", "2 min", "120 min", "2 h"]
