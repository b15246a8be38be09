"""Fields of the API -> options of a generation, without a server."""

import base64
import io
from typing import Any

import pytest
from PIL import Image

from stepvideo_gateway.errors import BadRequest
from stepvideo_gateway.fields import asked, param_of, seconds_of, settings_of

MODEL = "step-video-ti2v"
DEFAULTS = {"num_frames": 102, "height": 544, "width": 992}


def png(side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


def options(**given: Any) -> dict[str, Any]:
    return asked({"prompt": "a cat", "input_reference": png(), **given}, MODEL, DEFAULTS).options


def test_what_is_left_out_is_the_servers() -> None:
    assert options() == {"num_frames": 102, "height": 544, "width": 992}
    assert options(size="", seconds="", seed="", quality="") == options()


def test_previews_are_asked_for_by_their_format_and_are_no_setting_of_the_video() -> None:
    plain = options()
    for nothing in (None, ""):
        assert options(preview_format=nothing) == plain
    moving = options(preview_format="webp")
    assert moving == {**plain, "preview_format": "webp", "preview_every": 1}
    assert settings_of(moving) == plain
    with pytest.raises(BadRequest, match=r"^preview_format must be one of jpeg, webp, got 'gif'\.$"):
        options(preview_format="gif")


@pytest.mark.parametrize(
    ("seconds", "frames", "real"),
    [
        ("4", 102, "4.08"),
        (4, 102, "4.08"),
        ("8", 204, "8.16"),
        ("0.1", 17, "0.68"),
        (3.4, 85, "3.4"),
        ("6.8", 170, "6.8"),
    ],
)
def test_seconds_become_the_nearest_length_and_the_answer_has_the_real_one(
    seconds: Any, frames: int, real: str
) -> None:
    assert options(seconds=seconds)["num_frames"] == frames
    assert seconds_of(frames) == real


def test_numbers_are_the_same_from_forms_and_from_json() -> None:
    form = options(
        size="992x544", num_inference_steps="50", guidance_scale="9", flow_shift="7.5", motion_score="5", seed="7"
    )
    json = options(size="992x544", num_inference_steps=50, guidance_scale=9, flow_shift=7.5, motion_score=5, seed=7)
    assert form == json
    assert json["steps"] == 50
    assert isinstance(form["steps"], int)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"seed": True}, "seed"),
        ({"seed": "7.5"}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"guidance_scale": "nan"}, "guidance_scale"),
        ({"guidance_scale": "inf"}, "guidance_scale"),
        ({"flow_shift": -0.1}, "flow_shift"),
        ({"seconds": "1e9"}, "seconds"),
        ({"seconds": {"a": 1}}, "seconds"),
        ({"num_frames": 17, "seconds": 4}, "num_frames"),
        ({"num_frames": "0"}, "num_frames"),
        ({"size": 992}, "size"),
        ({"size": "992x544x3"}, "size"),
        ({"size": "0x544"}, "size"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a" * 16_385}, "prompt"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"input_reference": "http://169.254.169.254/latest"}, "input_reference"),
        ({"input_reference": "data:image/png;base64,???"}, "input_reference"),
        ({"input_reference": {"file_id": "file-1"}}, "input_reference"),
        ({"input_reference": {}}, "input_reference"),
        ({"input_reference": b"GIF89a"}, "input_reference"),
        ({"input_reference": png()[:20]}, "input_reference"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        options(**given)
    assert refused.value.param == param
    assert refused.value.body["error"]["code"] == "invalid_value"
    assert refused.value.headers == {"x-should-retry": "false"}


def test_a_data_url_is_the_file() -> None:
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    for reference in (url, {"image_url": url}):
        assert asked({"prompt": "a", "input_reference": reference}, MODEL, DEFAULTS).image == png()


def test_the_fingerprint_is_that_of_the_request() -> None:
    def fingerprint(**given: Any) -> str:
        return asked({"prompt": "a", "input_reference": png(), **given}, MODEL, DEFAULTS).fingerprint

    assert fingerprint() == fingerprint(seconds="4", size="992x544")
    others = {fingerprint(), fingerprint(seed=1), fingerprint(priority="low"), fingerprint(input_reference=png(9))}
    assert len(others) == 4


def test_a_camera_movement_joins_the_prompt() -> None:
    plain, moved = (
        asked({"prompt": "a", "input_reference": png(), **more}, MODEL, DEFAULTS)
        for more in ({}, {"camera": "pan-left"})
    )
    assert moved.prompt.startswith(plain.prompt)
    assert len(moved.prompt) > len(plain.prompt)


def test_sentences_of_the_server_are_about_fields() -> None:
    assert param_of("STEPS must be from 1 to 200, got 0.") == "num_inference_steps"
    assert param_of("WIDTH must be at most 1920.") == "size"
    assert param_of("Something else.") is None
