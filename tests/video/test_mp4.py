"""The mp4 that leaves the server, decoded again."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.video.mp4 import Mp4Encoder, crop_to_standard, encode_mp4, to_uint8
from tests.video.decode import decode_mp4

OPEN_FILES = Path("/proc/self/fd")
ENCODE_AND_WAIT = """
from tests.video.test_mp4 import Mp4Encoder, clip
with Mp4Encoder(64, 96) as encoder:
    encoder.write(clip())
    print("up", flush=True)
    input()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go during the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def clip(count: int = 17, height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    """A smooth pattern that drifts to the right, uint8 [count, height, width, 3]."""
    frame, y, x = np.mgrid[0:count, 0:height, 0:width]
    waves = [np.sin((x - frame) / 9), np.cos(y / 11), np.sin((x + y - frame) / 17)]
    frames: NDArray[np.uint8] = (np.stack(waves, axis=-1) * 90 + 128).astype(np.uint8)
    return frames


def running_encoders() -> list[str]:
    return [child.name() for child in psutil.Process().children() if "ffmpeg" in child.name()]


def test_to_uint8_gives_the_official_frames(shared: Path) -> None:
    goldens = load_file(shared / "goldens/tiny-a/goldens.safetensors")
    frames = to_uint8(goldens["e2e.video"][0])
    np.testing.assert_array_equal(frames, goldens["e2e.frames_u8"][::5].numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_to_uint8_clamps_and_truncates(dtype: torch.dtype) -> None:
    values = torch.tensor([-7.0, -1.0, 0.0, 0.9921875, 1.0, 7.0], dtype=dtype)
    frames = to_uint8(values[:, None, None, None].expand(6, 3, 2, 4))
    assert frames.shape == (6, 2, 4, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 0, 127, 254, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_to_uint8_refuses_what_is_not_finite(value: float) -> None:
    video = torch.zeros(1, 3, 2, 2)
    video[0, 1, 1, 0] = value
    with pytest.raises(StepVideoError, match="must be finite"):
        to_uint8(video)


@pytest.mark.parametrize(
    ("size", "cropped"),
    [((544, 992), (540, 960)), ((992, 544), (960, 540)), ((64, 96), (64, 96)), ((544, 960), (544, 960))],
)
def test_only_the_model_size_is_cropped_to_its_centre(size: tuple[int, int], cropped: tuple[int, int]) -> None:
    rows = np.arange(size[0] * size[1] * 3).reshape(1, *size, 3).astype(np.uint8)
    top, left = (size[0] - cropped[0]) // 2, (size[1] - cropped[1]) // 2
    expected = rows[:, top : size[0] - top, left : size[1] - left]
    assert expected.shape[1:3] == cropped
    np.testing.assert_array_equal(crop_to_standard(rows), expected)


def test_the_file_holds_the_frames(temporary: Path) -> None:
    frames = clip(34)
    data = encode_mp4(iter([frames[:17], frames[17:]]))
    decoded, stream = decode_mp4(data)
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 4
    assert "h264" in stream
    assert "yuv420p(tv, bt709, progressive)" in stream
    assert "25 fps" in stream
    assert data.index(b"moov") < data.index(b"mdat"), "faststart: the index comes first"
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (100, 150, 200), (255, 255, 255), (0, 0, 0)])
def test_colours_survive(colour: tuple[int, int, int]) -> None:
    frames = np.broadcast_to(np.array(colour, np.uint8), (2, 64, 96, 3))
    assert np.abs(decode_mp4(encode_mp4([frames]))[0].astype(int) - frames).max() <= 2


def test_the_same_frames_give_the_same_bytes_however_they_are_cut() -> None:
    frames = clip(34, 128, 192)
    whole = encode_mp4([frames], threads=2)
    assert encode_mp4([frames], threads=2) == whole
    assert encode_mp4([frames[:1], frames[1:20], frames[20:20], frames[20:]], threads=2) == whole


def test_the_cropped_size_is_encoded_as_it_is() -> None:
    frames = crop_to_standard(np.full((2, 992, 544, 3), 90, np.uint8))
    assert decode_mp4(encode_mp4([frames]))[0].shape == (2, 960, 540, 3)


def test_more_quality_is_closer() -> None:
    frames = clip()
    distance = {}
    for crf in (5, 45):
        with Mp4Encoder(64, 96, crf=crf) as encoder:
            encoder.write(frames)
            distance[crf] = np.abs(decode_mp4(encoder.finish())[0].astype(int) - frames).mean()
    assert distance[5] < distance[45]


def test_an_error_of_the_decoder_stops_ffmpeg_and_closes_its_files(temporary: Path) -> None:
    def chunks() -> Iterator[NDArray[np.uint8]]:
        yield clip()
        assert len(running_encoders()) == 1
        assert not list(temporary.iterdir())
        raise KeyError("the decoder failed")

    open_files = len(list(OPEN_FILES.iterdir()))

    with pytest.raises(KeyError, match="the decoder failed"):
        encode_mp4(chunks())
    assert not running_encoders()
    assert len(list(OPEN_FILES.iterdir())) == open_files


def test_no_disk_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full or may only be read costs nobody the video that has been computed."""
    with monkeypatch.context() as full:
        full.setattr(tempfile, "tempdir", "/nowhere")
        data = encode_mp4([clip(2)])
    assert decode_mp4(data)[0].shape == (2, 64, 96, 3)


def test_an_encoder_that_is_killed_leaves_nothing(root: Path, tmp_path: Path) -> None:
    """As the process of a model is that has to be replaced."""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", ENCODE_AND_WAIT]
    with subprocess.Popen(command, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        [encoder] = psutil.Process(process.pid).children()
        process.kill()
    assert not psutil.wait_procs([encoder], timeout=30.0)[1]
    assert not list(tmp_path.iterdir())


def test_a_failing_ffmpeg_is_an_error_with_its_last_line(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = temporary / "ffmpeg"
    broken.write_text("#!/bin/sh\necho starting >&2\necho no space left on device >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))
    with pytest.raises(StepVideoError, match=r"got 3 \(no space left on device\)"):
        encode_mp4([clip(34)])
    assert list(temporary.iterdir()) == [broken]


def test_a_real_refusal_of_ffmpeg_is_an_error(temporary: Path) -> None:
    with Mp4Encoder(64, 96, fps=0) as encoder, pytest.raises(StepVideoError, match=r"^ffmpeg must end with code 0"):
        encoder.finish()
    assert not list(temporary.iterdir())


def test_a_missing_ffmpeg_is_an_error(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(temporary / "absent"))
    with pytest.raises(StepVideoError, match=r"^ffmpeg must be runnable"):
        encode_mp4([clip()])
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "at least one frame"),
        ([clip(1, 63, 96)], "even height and width, got 63x96"),
        ([clip(1), clip(1, 64, 64)], "must be 64x96 .* got 64x64"),
        ([clip(1).astype(np.float32)], "must be uint8"),
        ([clip(1), clip(1)[0]], r"got uint8 \[64, 96, 3\]"),
    ],
)
def test_wrong_frames_are_refused(temporary: Path, chunks: list[NDArray[Any]], message: str) -> None:
    with pytest.raises(StepVideoError, match=message):
        encode_mp4(chunks)
    assert not list(temporary.iterdir())


def test_frames_after_the_end_are_refused() -> None:
    with Mp4Encoder(64, 96) as encoder:
        encoder.write(clip(1))
        encoder.finish()
        with pytest.raises(StepVideoError, match="before finish"):
            encoder.write(clip(1))
