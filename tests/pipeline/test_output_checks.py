"""The gates of [gates], on frames made for the purpose."""

import logging
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepvideo_serve.config import GatesConfig, VideoConfig
from stepvideo_serve.errors import BadOutput, ConfigError
from stepvideo_serve.pipeline.output_checks import MOST_DB, Gates, peak_signal_to_noise_db
from stepvideo_serve.video.mp4 import encode_mp4, to_uint8

HEIGHT, WIDTH, COUNT = 48, 64, 34
Frames = NDArray[np.uint8]


def picture(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """A fitted image, fp32 [3, height, width]."""
    return torch.linspace(-0.9, 0.9, 3 * height * width).reshape(3, height, width)


def moving() -> Frames:
    """A video that begins with the picture and becomes brighter, uint8 [COUNT, HEIGHT, WIDTH, 3]."""
    first = to_uint8(picture()[None]).astype(np.int16)
    frames: Frames = (first + 2 * np.arange(COUNT)[:, None, None, None]).clip(0, 255).astype(np.uint8)
    return frames


def passed(frames: Frames, **config: Any) -> Gates:
    """The gates after a video in two chunks."""
    gates = Gates(GatesConfig(**config), VideoConfig(), COUNT, picture())
    for chunk in np.array_split(frames, 2):
        gates.frames(chunk)
    gates.ended()
    return gates


def still(level: int) -> Frames:
    return np.full((COUNT, HEIGHT, WIDTH, 3), level, np.uint8)


# gate: (frames that fail it, keys of [gates] besides the mode, what the sentence says)
FAILING: dict[str, tuple[Frames, dict[str, float], str]] = {
    "frame_count": (moving()[:-1], {}, "must have 34 frames, the decoder gave 33"),
    "black": (still(1), {}, "brighter than 2 of 255 on average, the brightest has 1:"),
    "frozen": (still(90), {}, r"differ from the first by more than 0\.1 of 255 on average, the most is 0"),
    "first_frame": (moving()[:, ::-1], {"first_frame_psnr_db": 20.0}, r"PSNR of at least 20 dB, got \d+\.\d dB"),
}


@pytest.mark.parametrize("gate", FAILING)
def test_an_error_fails_the_request(gate: str) -> None:
    frames, keys, sentence = FAILING[gate]
    with pytest.raises(BadOutput, match=sentence) as caught:
        passed(frames, **keys, **{gate: "error"})
    assert caught.value.code == "INTERNAL"


@pytest.mark.parametrize("gate", FAILING)
def test_a_warning_is_reported_and_logged(gate: str, caplog: pytest.LogCaptureFixture) -> None:
    frames, keys, sentence = FAILING[gate]
    with caplog.at_level(logging.WARNING):
        warnings = passed(frames, **keys, **{gate: "warn"}).report()["warnings"]
    [message] = [warning["message"] for warning in warnings if warning["gate"] == gate]
    assert re.search(sentence, message)
    assert f"gate {gate}: {message}" in caplog.messages


@pytest.mark.parametrize("gate", FAILING)
def test_what_is_off_is_not_looked_at(gate: str, caplog: pytest.LogCaptureFixture) -> None:
    frames, keys, _ = FAILING[gate]
    with caplog.at_level(logging.WARNING):
        warnings = passed(frames, **keys, **{gate: "off", "frame_count": "off"}).report()["warnings"]
    assert gate not in [warning["gate"] for warning in warnings]
    assert not [message for message in caplog.messages if message.startswith(f"gate {gate}:")]


def test_a_good_video_passes_them_all_and_is_measured() -> None:
    strict = dict.fromkeys(FAILING, "error")
    report = passed(moving(), first_frame_psnr_db=40.0, **strict).report()
    assert report["warnings"] == []
    assert report["media"]["first_frame_psnr_db"] == MOST_DB
    frames = moving()[:, ::4, ::4].astype(np.float64)
    assert report["media"]["brightness"] == pytest.approx(frames[-1].mean(), abs=5e-4)
    assert report["media"]["change"] == pytest.approx((frames[-1] - frames[0]).mean(), abs=5e-4)


def test_one_frame_that_moves_or_shines_is_enough() -> None:
    """The frame may be in any chunk."""
    for index in (1, COUNT - 1):
        frames = still(0)
        frames[index] = 80
        assert passed(frames, black="error", frozen="error").report()["warnings"] == []


def test_thresholds_are_inclusive() -> None:
    assert passed(still(90), black="warn", black_level=90.0, frozen="off").warnings[0]["gate"] == "black"
    assert passed(still(90), black="warn", black_level=89.9, frozen="off").warnings == []
    step = np.concatenate([still(90)[:-1], still(92)[:1]])
    assert passed(step, frozen="warn", frozen_difference=2.0).warnings[0]["gate"] == "frozen"
    assert passed(step, frozen="warn", frozen_difference=1.9).warnings == []


def test_no_frame_at_all_is_an_error_whatever_is_configured() -> None:
    gates = Gates(GatesConfig(frame_count="off"), VideoConfig(), COUNT, picture())
    with pytest.raises(BadOutput, match="it gave none"):
        gates.ended()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_latents_that_are_not_finite_are_an_error_whatever_is_configured(value: float) -> None:
    off = GatesConfig(**dict.fromkeys(("frame_count", "mp4", "first_frame", "black", "frozen"), "off"))  # type: ignore[arg-type]
    gates = Gates(off, VideoConfig(), COUNT, picture())
    latents = torch.zeros(6, 4, 3, 4)
    gates.latents(latents)
    latents[3, 2, 1, 0] = value
    with pytest.raises(BadOutput, match="must be finite after the last step, got NaN or infinite values"):
        gates.latents(latents)


def test_the_first_frame_is_compared_with_the_part_of_the_image_that_the_file_shows() -> None:
    image = picture(544, 992)
    frames = to_uint8(image[None]).repeat(2, axis=0)
    for crop, shown in ((True, frames[:, 2:542, 16:976]), (False, frames)):
        gates = Gates(GatesConfig(), VideoConfig(crop=crop), 2, image)
        gates.frames(shown)
        assert gates.measured["first_frame_psnr_db"] == MOST_DB


def test_psnr() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    assert peak_signal_to_noise_db(grey + np.uint8(10), grey) == pytest.approx(28.1308, abs=1e-4)  # 20 log10(25.5)
    assert peak_signal_to_noise_db(still(255), still(0)) == 0.0
    assert peak_signal_to_noise_db(grey, grey) == MOST_DB


def test_the_file_must_hold_the_frames_that_passed() -> None:
    frames = moving()
    good, other_speed = encode_mp4([frames]), VideoConfig(fps=30)
    gates = passed(frames)
    gates.mp4(good)
    assert gates.warnings == []
    for wrong, found in (
        (encode_mp4([frames[:-1]]), "frames=33"),
        (encode_mp4([frames[:, :32]]), "height=32"),
        (good[:700], "must decode without an error"),
    ):
        with pytest.raises(BadOutput, match=found):
            gates.mp4(wrong)
    gates = Gates(GatesConfig(mp4="warn"), other_speed, COUNT, picture())
    gates.frames(frames)
    gates.mp4(good)
    assert "fps=25.0" in gates.warnings[-1]["message"]
    gates = Gates(GatesConfig(mp4="off"), other_speed, COUNT, picture())
    gates.mp4(b"not a file")
    assert gates.warnings == []


def test_thresholds_below_zero_are_refused() -> None:
    for name in ("first_frame_psnr_db", "black_level", "frozen_difference"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 0"):
            replace(GatesConfig(), **{name: -1.0})  # type: ignore[arg-type]
