"""Both halves of the Video-VAE: sizes, causality in time, independence of chunks."""

import pytest
import torch
from torch import Tensor

from stepvideo_serve.geometry import FRAMES_PER_CHUNK, LATENTS_PER_CHUNK
from stepvideo_serve.vae.chunking import decode_chunks, sample_posterior
from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.model import VideoDecoder, VideoEncoder
from tests.mini import normal, relative_error, with_random_weights

CONFIG = VAEConfig(
    z_channels=2, num_res_blocks=1, encoder_stem=32, encoder_widths=(64, 64, 96, 64), decoder_widths=(64, 64, 96, 64)
)
SIDES = (2, 3)
PIXELS = (32, 48)


@pytest.fixture(scope="module")
def encoder() -> VideoEncoder:
    return with_random_weights(VideoEncoder(CONFIG))


@pytest.fixture(scope="module")
def decoder() -> VideoDecoder:
    return with_random_weights(VideoDecoder(CONFIG))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return normal(1, FRAMES_PER_CHUNK, 3, *PIXELS).tanh()


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return normal(1, LATENTS_PER_CHUNK, CONFIG.z_channels, *SIDES)


def test_sizes(encoder: VideoEncoder, decoder: VideoDecoder, pixels: Tensor, latents: Tensor) -> None:
    mean, logvar = encoder(pixels)
    assert mean.shape == logvar.shape == latents.shape
    assert decoder(latents).shape == pixels.shape


def test_an_image_is_encoded_like_the_first_frame_of_a_video(encoder: VideoEncoder, pixels: Tensor) -> None:
    video, image = encoder(pixels), encoder(pixels[:, :1])
    for of_video, of_image in zip(video, image, strict=True):
        assert of_image.shape[1] == 1
        assert relative_error(of_image, of_video[:, :1]) < 1e-5


def test_one_latent_is_decoded_like_the_first_of_three(decoder: VideoDecoder, latents: Tensor) -> None:
    video, image = decoder(latents), decoder(latents[:, :1])
    assert image.shape[1] == 1
    assert relative_error(image, video[:, :1]) < 1e-5


def test_latents_see_no_later_frames(encoder: VideoEncoder, pixels: Tensor) -> None:
    before = encoder(pixels)[0]
    changed = pixels.clone()
    changed[:, 9:] = -changed[:, 9:]  # frames 1..8 belong to latent 1, 9..16 to latent 2
    after = encoder(changed)[0]
    assert relative_error(after[:, :2], before[:, :2]) < 1e-5
    assert relative_error(after[:, 2], before[:, 2]) > 1e-2


def test_frames_see_no_later_latents(decoder: VideoDecoder, latents: Tensor) -> None:
    before = decoder(latents)
    changed = latents.clone()
    changed[:, 2] = -changed[:, 2]
    after = decoder(changed)
    assert relative_error(after[:, :9], before[:, :9]) < 1e-5
    assert relative_error(after[:, 9:], before[:, 9:]) > 1e-2


def test_earlier_latents_are_remembered(decoder: VideoDecoder, latents: Tensor) -> None:
    changed = latents.clone()
    changed[:, 0] = -changed[:, 0]
    assert relative_error(decoder(changed)[:, -1], decoder(latents)[:, -1]) > 1e-3


def test_chunks_are_decoded_apart(decoder: VideoDecoder) -> None:
    """Beyond the two frames at a border, a chunk's frames are those that it has alone."""
    chunks = [normal(LATENTS_PER_CHUNK, CONFIG.z_channels, *SIDES, seed=seed) for seed in range(3)]
    video = torch.cat(list(decode_chunks(torch.cat(chunks), decoder)))
    assert video.shape == (3 * FRAMES_PER_CHUNK, 3, *PIXELS)
    for index, chunk in enumerate(chunks):
        alone = decoder(chunk[None])[0]
        inner = video[index * FRAMES_PER_CHUNK : (index + 1) * FRAMES_PER_CHUNK]
        assert relative_error(inner[1:-1], alone[1:-1]) < 1e-5
    assert torch.equal(video[0], decoder(chunks[0][None])[0, 0])


def test_batches_do_not_mix(decoder: VideoDecoder, latents: Tensor) -> None:
    both = torch.cat([latents, normal(*latents.shape, seed=5)])
    assert relative_error(decoder(both)[:1], decoder(latents)) < 1e-5


def test_posterior_by_hand() -> None:
    mean, logvar, noise = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0]), torch.tensor([0.5, -1.0])
    expected = [1.5, 1 - float(torch.e)]
    assert sample_posterior(mean, logvar, noise).tolist() == pytest.approx(expected, rel=1e-6)
