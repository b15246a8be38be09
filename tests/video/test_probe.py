"""What an mp4 holds, found by decoding it."""

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.video.mp4 import Mp4Encoder
from stepvideo_serve.video.probe import Mp4Facts, probe_mp4


def clip(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """A pattern that drifts, uint8 [count, height, width, 3]."""
    frame, y, x = np.mgrid[0:count, 0:height, 0:width]
    waves = np.sin((x - 2 * frame) / 9) + np.cos(y / 11)
    frames: NDArray[np.uint8] = np.repeat((waves[..., None] * 60 + 128).astype(np.uint8), 3, axis=-1)
    return frames


def encoded(frames: NDArray[np.uint8], fps: int = 25) -> bytes:
    with Mp4Encoder(frames.shape[1], frames.shape[2], fps=fps) as encoder:
        encoder.write(frames)
        return encoder.finish()


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return encoded(clip(34, 64, 96))


@pytest.mark.parametrize(
    ("count", "height", "width", "fps"),
    [(1, 32, 48, 25), (17, 48, 32, 24), (34, 64, 96, 25), (51, 32, 32, 30), (17, 32, 32, 7)],
)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_holds_what_it_was_made_of(count: int, height: int, width: int, fps: int, threads: int) -> None:
    data = encoded(clip(count, height, width), fps)
    assert probe_mp4(data, threads) == Mp4Facts(count, height, width, float(fps))


def test_equal_frames_are_counted_one_by_one() -> None:
    assert probe_mp4(encoded(np.full((51, 32, 48, 3), 90, np.uint8))).frames == 51


@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.99])
def test_a_file_that_ends_early_is_refused(mp4: bytes, part: float) -> None:
    with pytest.raises(StepVideoError, match=r"^The mp4 must decode without an error, got '.*' from \d+ bytes: "):
        probe_mp4(mp4[: int(len(mp4) * part)])


def test_a_damaged_file_is_refused(mp4: bytes) -> None:
    middle = len(mp4) * 3 // 4
    with pytest.raises(StepVideoError, match="must decode without an error"):
        probe_mp4(mp4[:middle] + bytes(400) + mp4[middle + 400 :])


def test_no_decoder_is_left_behind(mp4: bytes) -> None:
    probe_mp4(mp4)
    with pytest.raises(StepVideoError):
        probe_mp4(mp4[:600])
    assert not [child for child in psutil.Process().children() if "ffmpeg" in child.name()]
