"""Latents to colours without the VAE."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.video.preview import (
    ANIMATION_SCALE,
    PREVIEW_SCALE,
    LatentPreview,
    encode_jpeg,
    encode_preview,
    encode_webp,
    fit_latent_rgb,
)


def test_the_fit_recovers_a_linear_map_and_leaves_unused_channels_at_zero() -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.tensor([[0.2, -0.1, 0.0, 0.0], [0.0, 0.3, 0.1, 0.0], [-0.2, 0.0, 0.1, 0.0]])
    bias = torch.tensor([0.1, -0.2, 0.0])
    latents = torch.randn(8, 4, 5, 6, generator=generator)
    latents[:, 3] = 0
    colours = torch.einsum("kc,nchw->nkhw", weight, latents) + bias[:, None, None]
    texture = torch.tensor([[0.05, -0.05], [-0.05, 0.05]]).repeat(5 * 8, 6 * 8)  # of mean zero in each cell
    images = colours.repeat_interleave(16, 2).repeat_interleave(16, 3) + texture
    fitted_weight, fitted_bias = fit_latent_rgb(latents, images)
    torch.testing.assert_close(fitted_weight, weight, atol=1e-3, rtol=0)
    torch.testing.assert_close(fitted_bias, bias, atol=1e-3, rtol=0)
    assert not fitted_weight[:, 3].any()


def test_a_fit_on_constant_latents_is_the_mean_colour() -> None:
    images = torch.full((2, 3, 32, 48), 0.25)
    weight, bias = fit_latent_rgb(torch.ones(2, 4, 2, 3), images)
    assert torch.isfinite(weight).all()
    torch.testing.assert_close(weight.sum(1) + bias, torch.full((3,), 0.25))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(StepVideoError, match=r"Images must be \[2, 3, 32, 48\]"):
        fit_latent_rgb(torch.zeros(2, 4, 2, 3), torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_latent_frame_has_its_colours(dtype: torch.dtype) -> None:
    latents = torch.zeros(18, 4, 4, 6, dtype=dtype)
    latents[0, 0], latents[9, 1], latents[17, 2, :, 3:] = 1, 1, 1
    colours = LatentPreview(torch.eye(3, 4) * 2, torch.full((3,), -1.0)).render(latents)
    expected = np.zeros((18, 4, 6, 3), np.uint8)
    expected[0, ..., 0], expected[9, ..., 1], expected[17, :, 3:, 2] = 255, 255, 255
    np.testing.assert_array_equal(colours, expected)


def cells(count: int) -> NDArray[np.uint8]:
    """Frames [count, 4, 6, 3], each of one grey of its own."""
    levels = np.linspace(0, 255, count).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, 4, 6, 3)).copy()


def test_a_jpeg_has_the_first_the_middle_and_the_last_frame_side_by_side() -> None:
    with Image.open(BytesIO(encode_jpeg(cells(18)))) as image:
        assert image.format == "JPEG"
        picture = np.array(image).astype(int)
    assert picture.shape == (4 * PREVIEW_SCALE, 3 * 6 * PREVIEW_SCALE, 3)
    for shown, frame in zip(np.split(picture, 3, axis=1), cells(18)[[0, 9, 17]], strict=True):
        assert np.abs(shown - frame[0, 0].astype(int)).max() <= 3


def test_a_single_frame_is_shown_three_times() -> None:
    greys = np.random.default_rng(7).integers(0, 256, (1, 2, 4, 1), np.uint8)
    colours = np.repeat(greys, 3, axis=3)  # JPEG carries colours over from one picture to its neighbour
    with Image.open(BytesIO(encode_jpeg(colours, quality=95))) as image:
        first, second, third = np.split(np.array(image).astype(int), 3, axis=1)
    assert np.abs(first - second).max() <= 3
    assert np.abs(first - third).max() <= 3


def test_a_webp_has_all_frames_at_the_speed_of_the_video_without_end() -> None:
    frames = cells(18)
    with Image.open(BytesIO(encode_webp(frames))) as image:
        assert (image.format, image.size) == ("WEBP", (6 * ANIMATION_SCALE, 4 * ANIMATION_SCALE))
        assert getattr(image, "n_frames", 1) == 18
        assert image.info["loop"] == 0
        durations = []
        for index, frame in enumerate(frames):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
            shown = np.array(image.convert("RGB")).astype(int)
            assert np.abs(shown - frame[0, 0].astype(int)).max() <= 6, f"frame {index}"
    assert abs(sum(durations) - 102 / 25 * 1000) < 18, "18 latent frames are 102 frames"


def test_a_picture_that_stands_still_is_one_too() -> None:
    with Image.open(BytesIO(encode_webp(np.full((3, 4, 6, 3), 99, np.uint8)))) as image:
        assert np.abs(np.array(image.convert("RGB")).astype(int) - 99).max() <= 6


def test_the_format_decides_the_file() -> None:
    frames = cells(3)
    assert encode_preview(frames, "jpeg") == encode_jpeg(frames)
    assert encode_preview(frames, "webp") == encode_webp(frames)
    with pytest.raises(KeyError):
        encode_preview(frames, "gif")


@pytest.mark.parametrize(("encode", "scale"), [(encode_jpeg, PREVIEW_SCALE), (encode_webp, ANIMATION_SCALE)])
def test_cells_are_joined_smoothly(encode: Callable[[NDArray[np.uint8]], bytes], scale: int) -> None:
    half = np.zeros((1, 8, 16, 3), np.uint8)
    half[:, :, 8:] = 255
    with Image.open(BytesIO(encode(half))) as image:
        row = np.array(image.convert("L"))[4 * scale, : 16 * scale].astype(int)
    assert row[0] < 10
    assert row[-1] > 245
    assert ((row > 10) & (row < 245)).sum() >= scale // 2, "between two cells there are colours between theirs"


@pytest.mark.parametrize("shape", [(3, 5, 2, 2), (0, 4, 2, 2), (4, 2, 2)])
def test_other_latents_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(StepVideoError, match=r"^Latents must be \[F, 4, h, w\]"):
        LatentPreview(torch.ones(3, 4), torch.zeros(3)).render(torch.zeros(shape))


def test_a_map_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(StepVideoError, match=r"^A preview map must be"):
        LatentPreview(torch.ones(4, 3), torch.zeros(3))
