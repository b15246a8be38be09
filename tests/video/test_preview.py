"""Latents to colours without the VAE."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.video.preview import PREVIEW_SCALE, LatentPreview, encode_jpeg, fit_latent_rgb


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
def test_first_middle_and_last_frame_stand_side_by_side(dtype: torch.dtype) -> None:
    latents = torch.zeros(18, 4, 4, 6, dtype=dtype)
    latents[0, 0], latents[9, 1], latents[17, 2] = 1, 1, 1
    weight = torch.eye(3, 4) * 2
    picture = LatentPreview(weight, torch.full((3,), -1.0)).render(latents)
    width = 6 * PREVIEW_SCALE
    assert picture.shape == (4 * PREVIEW_SCALE, 3 * width, 3)
    assert picture.dtype == np.uint8
    for index in range(3):
        expected = [255 if channel == index else 0 for channel in range(3)]
        assert (picture[:, index * width : (index + 1) * width] == expected).all()


def test_a_single_frame_is_shown_three_times() -> None:
    picture = LatentPreview(torch.ones(3, 4), torch.zeros(3)).render(torch.rand(1, 4, 2, 3))
    first, second, third = np.split(picture, 3, axis=1)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)


def test_cells_are_joined_smoothly() -> None:
    latents = torch.tensor([-1.0, 1.0]).expand(1, 1, 1, 2)
    row = LatentPreview(torch.ones(3, 1), torch.zeros(3)).render(latents)[0, : 2 * PREVIEW_SCALE, 0].astype(int)
    assert row[0] == 0
    assert row[-1] == 255
    assert (np.diff(row) >= 0).all()
    assert len(set(row)) > 2


@pytest.mark.parametrize("shape", [(3, 5, 2, 2), (0, 4, 2, 2), (4, 2, 2)])
def test_other_latents_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(StepVideoError, match=r"^Latents must be \[F, 4, h, w\]"):
        LatentPreview(torch.ones(3, 4), torch.zeros(3)).render(torch.zeros(shape))


def test_a_map_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(StepVideoError, match=r"^A preview map must be"):
        LatentPreview(torch.ones(4, 3), torch.zeros(3))


def test_the_jpeg_is_the_picture() -> None:
    rgb = np.full((16, 48, 3), (200, 100, 50), np.uint8)
    with Image.open(BytesIO(encode_jpeg(rgb))) as image:
        assert image.format == "JPEG"
        assert np.abs(np.array(image).astype(int) - rgb).max() <= 3
