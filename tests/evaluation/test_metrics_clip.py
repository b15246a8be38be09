"""The figures of one clip, against what can be computed by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.clip_measures import ClipMeasures, measure_clip, seam
from stepvideo_client.evaluation.motion import Motion, MotionMeter
from stepvideo_client.evaluation.video import read_frames
from tests.evaluation.synthetic import Frame, checkerboard, moving, plain, texture, write_mp4


def measured(frames: list[Frame], picture: Frame | None = None) -> ClipMeasures:
    return measure_clip(frames, picture).measures


def motion(frames: list[Frame]) -> Motion:
    meter = MotionMeter()
    for frame in frames:
        meter.add(frame)
    found = meter.finish()
    assert found is not None
    return found


def test_a_still_clip() -> None:
    found = measured([texture(64, 96)] * 34)
    assert (found.frames, found.height, found.width) == (34, 64, 96)
    assert found.temporal_flickering == 1
    assert found.motion_px == 0
    assert found.still_share == 1
    assert found.smoothness is None
    assert found.seam is None
    assert found.frozen
    assert not found.black
    assert found.sharpness_kept == 1


def test_one_frame_has_nothing_between_frames() -> None:
    found = measured([plain(90)])
    assert found.temporal_flickering is None
    assert found.motion_px is None
    assert found.seam is None
    assert not found.frozen


@pytest.mark.parametrize("height", [3, 10, 40])
def test_flicker_is_the_mean_difference_of_neighbours(height: int) -> None:
    """As VBench counts: 255 less the mean absolute difference, over 255."""
    found = measured([plain(100 + height * (index % 2)) for index in range(20)])
    assert found.temporal_flickering == pytest.approx((255 - height) / 255, abs=1e-12)
    assert not found.frozen


def test_the_seam_is_seen_at_borders_of_chunks_only() -> None:
    levels = np.cumsum([0, *(8 if index % 17 == 0 else 2 for index in range(1, 51))])
    assert measured([plain(level) for level in levels]).seam == pytest.approx(4)
    levels = np.cumsum([0, *(8 if index % 16 == 0 else 2 for index in range(1, 51))])
    assert measured([plain(level) for level in levels]).seam == pytest.approx(1)


def test_a_still_clip_that_jumps_at_a_border_has_a_large_seam() -> None:
    assert seam([0.0] * 16 + [20.0] + [0.0] * 16) == pytest.approx(200)
    assert seam([3.0] * 16) is None, "there is no border in one chunk"


@pytest.mark.parametrize("step", [(1, 0), (3, 4), (0, -6)])
def test_a_known_speed_is_found(step: tuple[int, int]) -> None:
    found = motion(moving([step] * 6))
    assert found.mean_px == pytest.approx(math.hypot(*step), rel=0.1)
    assert found.still_share == 0
    assert found.smoothness == pytest.approx(1, abs=0.1)
    assert len(found.by_pair_px) == 6


def test_speed_is_told_in_pixels_of_the_video_when_flow_is_found_on_smaller_frames() -> None:
    found = motion(moving([(8, 0)] * 3, height=256, width=1024))
    assert found.mean_px == pytest.approx(8, rel=0.1)


def test_motion_that_changes_its_speed_is_less_smooth() -> None:
    """|f' - f| over |f'| + |f|: speeds 1 and 2 in turns leave 1 - 1/3, stop and go leaves nothing."""
    uneven = motion(moving([(1, 0), (2, 0)] * 4))
    assert uneven.smoothness == pytest.approx(2 / 3, abs=0.06)
    jerky = motion(moving([(4, 0), (0, 0)] * 4))
    assert jerky.smoothness == pytest.approx(0, abs=0.1)
    assert jerky.still_share == pytest.approx(0.5)


def test_the_fastest_pixels_show_a_small_thing_that_moves() -> None:
    ground, thing = texture(128, 160), texture(32, 32, seed=1)
    frames = [ground.copy() for _ in range(5)]
    for index, frame in enumerate(frames):
        frame[40:72, 20 + 3 * index : 52 + 3 * index] = thing
    found = motion(frames)
    assert found.mean_px < 0.6
    assert found.fastest_px > 2
    assert found.still_share == 0


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    """A field of a checkerboard has four neighbours of the other level: 4 x 200 and -4 x 200."""
    found = measured([checkerboard(0, 200), checkerboard(0, 200)])
    assert found.sharpness == pytest.approx(800**2)
    kept = measured([checkerboard(0, 200), checkerboard(0, 100)])
    assert kept.sharpness_kept == pytest.approx(0.25)
    assert kept.sharpness == pytest.approx((800**2 + 400**2) / 2)


def test_exposure() -> None:
    half = plain(0)
    half[:, :48] = 255
    found = measured([half, half])
    assert found.brightness == pytest.approx(127.5)
    assert (found.dark_share, found.bright_share) == (0.5, 0.5)
    assert measured([plain(2), plain(1)]).black
    assert not measured([plain(2), plain(3)]).black


def test_the_first_frame_against_the_picture() -> None:
    frame = texture(64, 96)
    same = measured([frame, frame], frame)
    assert same.first_frame_psnr_db == 99
    assert same.first_frame_ssim == pytest.approx(1)
    brighter = measured([plain(100)], plain(105))
    assert brighter.first_frame_psnr_db == pytest.approx(20 * math.log10(255 / 5))
    assert measured([frame]).first_frame_psnr_db is None


def test_the_picture_is_cropped_as_the_server_crops() -> None:
    picture = texture(544, 992)
    found = measured([picture[2:542, 16:976]], picture)
    assert found.first_frame_psnr_db == 99


def test_a_file_is_read_back(tmp_path: Path) -> None:
    frames = moving([(2, 0)] * 19)
    write_mp4(tmp_path / "clip.mp4", frames)
    back = list(read_frames(tmp_path / "clip.mp4"))
    assert len(back) == len(frames)
    assert {frame.shape for frame in back} == {frames[0].shape}
    write_mp4(tmp_path / "still.mp4", frames[:1] * 3)
    for frame in read_frames(tmp_path / "still.mp4"):
        assert np.abs(frame.mean(axis=2) - frames[0].mean(axis=2)).mean() < 4, "colours have half of the resolution"
    colour = np.array([200, 40, 90], np.uint8)
    write_mp4(tmp_path / "colour.mp4", [np.broadcast_to(colour, (64, 64, 3)).copy()] * 2)
    [first, _] = read_frames(tmp_path / "colour.mp4")
    assert np.abs(first.astype(int) - colour).max() <= 2


@pytest.mark.parametrize("kept", [0, 3, 300])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, kept: int) -> None:
    write_mp4(tmp_path / "clip.mp4", moving([(2, 0)] * 19))
    path = tmp_path / "half.mp4"
    path.write_bytes((tmp_path / "clip.mp4").read_bytes()[:kept])
    with pytest.raises(InvalidInput, match=r"half.mp4' must decode without an error, got: ") as error:
        list(read_frames(path))
    assert "\n" not in str(error.value)
    with pytest.raises(InvalidInput, match="is not there"):
        list(read_frames(tmp_path / "none.mp4"))


def test_a_file_that_is_cut_off_in_the_middle_gives_what_was_whole_and_then_an_error(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", moving([(2, 0)] * 33))
    content = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) * 2 // 3])
    seen = 0
    with pytest.raises(InvalidInput, match="must decode without an error"):  # noqa: PT012
        for _ in read_frames(tmp_path / "half.mp4"):
            seen += 1
    assert seen < 34


def test_the_smallest_and_narrowest_frames(tmp_path: Path) -> None:
    for height, width in ((16, 16), (16, 1024), (32, 48)):
        assert measured(moving([(1, 0)] * 3, height, width)).motion_px is not None
    assert measured([plain(90)], plain(90, 32, 48)).first_frame_psnr_db is None, "the picture is smaller"
    write_mp4(tmp_path / "tiny.mp4", [plain(90, 8, 16)] * 2)
    with pytest.raises(InvalidInput, match="at least 16 pixels on each side"):
        list(read_frames(tmp_path / "tiny.mp4"))


def test_leaving_early_ends_ffmpeg(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", moving([(2, 0)] * 33))
    frames = read_frames(tmp_path / "clip.mp4")
    next(frames)
    frames.close()  # type: ignore[attr-defined]
