"""The building blocks of the Video-VAE against plain formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepvideo_serve.vae.layers import (
    CausalConv3d,
    Downsample,
    FrameNorm,
    ResBlock,
    SpatialDownsample,
    SpatialUpsample,
    TokenCausalAttention,
    Upsample,
    UpsampleRefiner,
    average_channels,
    channels_to_space,
    clamp_logvar,
    repeat_channels,
    space_to_channels,
)
from tests.mini import normal, relative_error, with_random_weights

CHANNELS = 64
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: CausalConv3d(CHANNELS, 32, 3),
    "norm": lambda: FrameNorm(CHANNELS),
    "res_block": lambda: ResBlock(CHANNELS, 96),
    "attention": lambda: TokenCausalAttention(CHANNELS),
    "spatial_downsample": lambda: SpatialDownsample(CHANNELS),
    "spatial_upsample": lambda: SpatialUpsample(CHANNELS),
    "refiner": lambda: UpsampleRefiner(CHANNELS),
}


@pytest.mark.parametrize("name", LAYERS)
def test_frames_see_no_later_frames(name: str) -> None:
    layer = with_random_weights(LAYERS[name]())
    x = normal(1, CHANNELS, 5, 4, 6)
    before = layer(x)
    assert before.shape[2] == 5
    x[:, :, 3] += 1.0 * normal(CHANNELS, 4, 6, seed=1)
    after = layer(x)
    assert relative_error(after[:, :, :3], before[:, :, :3]) < 1e-6
    assert relative_error(after[:, :, 3], before[:, :, 3]) > 1e-2


@pytest.mark.parametrize(("layer", "frames_out"), [(Downsample, 3), (Upsample, 10)])
def test_temporal_resampling_sees_no_later_frames(layer: type[nn.Module], frames_out: int) -> None:
    resample = with_random_weights(layer(CHANNELS))
    x = normal(1, CHANNELS, 5, 4, 6)
    before = resample(x)
    assert before.shape[2] == frames_out
    x[:, :, 3:] += 1.0
    after = resample(x)
    untouched = 2 if frames_out == 3 else 6  # output frame k of the downsampling sees inputs up to 2k
    assert relative_error(after[:, :, :untouched], before[:, :, :untouched]) < 1e-6
    assert relative_error(after[:, :, untouched], before[:, :, untouched]) > 1e-3


def test_convolution_by_hand() -> None:
    """Zeros in front in time and around in space."""
    layer = with_random_weights(CausalConv3d(2, 3, 3))
    x = normal(1, 2, 4, 5, 6)
    padded = torch.zeros(2, 6, 7, 8)
    padded[:, 2:, 1:6, 1:7] = x[0]
    bias = layer.state_dict()["conv.bias"]
    for t, h, w in ((0, 0, 0), (1, 2, 3), (3, 4, 5)):
        window = padded[:, t : t + 3, h : h + 3, w : w + 3]
        expected = (layer.conv.weight * window).sum(dim=(1, 2, 3, 4))
        assert torch.allclose(layer(x)[0, :, t, h, w], expected + bias, atol=1e-5)


def test_norm_takes_statistics_per_frame() -> None:
    layer = with_random_weights(FrameNorm(CHANNELS))
    x = normal(2, CHANNELS, 3, 4, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    for frame in range(3):
        alone = F.group_norm(x[:, :, frame], 32, layer.weight, layer.bias)
        assert torch.allclose(layer(x)[:, :, frame], alone, atol=1e-5)
        assert torch.allclose(layer(x, silu=True)[:, :, frame], F.silu(alone), atol=1e-5)


def test_attention_is_causal_in_raster_order_over_all_frames() -> None:
    layer = with_random_weights(TokenCausalAttention(CHANNELS))
    x = normal(1, CHANNELS, 2, 3, 4)
    tokens = layer.norm(x)[0].flatten(1).T
    q, k, v = (tokens @ p.conv.weight.flatten(1).T + p.conv.bias for p in (layer.q, layer.k, layer.v))
    scores = (q @ k.T / math.sqrt(CHANNELS)).masked_fill(torch.ones(24, 24).triu(1).bool(), -math.inf)
    mixed = torch.softmax(scores, dim=-1) @ v
    projected = mixed @ layer.proj_out.conv.weight.flatten(1).T + layer.proj_out.conv.bias
    expected = x + projected.T.reshape(1, CHANNELS, 2, 3, 4)
    assert relative_error(layer(x), expected) < 1e-5


def test_spatial_downsampling_pads_right_and_below() -> None:
    layer = with_random_weights(SpatialDownsample(CHANNELS))
    x = normal(1, CHANNELS, 1, 4, 6)
    first = (layer.conv.weight * x[0, :, 0, :3, :3]).sum(dim=(1, 2, 3))
    assert layer(x).shape == (1, CHANNELS, 1, 2, 3)
    assert torch.allclose(layer(x)[0, :, 0, 0, 0], first + layer.state_dict()["conv.bias"], atol=1e-5)


@pytest.mark.parametrize("frames", [1, 3, 17])
def test_channels_to_space_undoes_space_to_channels(frames: int) -> None:
    x = normal(2, 3, frames, 4, 6)
    packed = space_to_channels(x, 2)
    assert packed.shape == (2, 24, (frames + 1) // 2, 2, 3)
    assert torch.equal(channels_to_space(packed, 2), x)


def test_space_to_channels_puts_zero_frames_in_front() -> None:
    """Channels are in the order frame, row, column of the neighbourhood, after the original channel."""
    x = torch.arange(1.0, 13.0).reshape(1, 1, 3, 2, 2)
    packed = space_to_channels(x, 2)[0, :, :, 0, 0]
    assert packed[:, 0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert packed[:, 1].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]


def test_shortcuts_average_and_repeat_neighbouring_channels() -> None:
    x = torch.tensor([1.0, 3.0, 5.0, 7.0]).reshape(1, 4, 1, 1, 1)
    assert average_channels(x, 2).flatten().tolist() == [2.0, 6.0]
    assert repeat_channels(average_channels(x, 2), 4).flatten().tolist() == [2.0, 2.0, 6.0, 6.0]


def test_log_variance_is_clamped() -> None:
    values: Tensor = clamp_logvar(torch.tensor([-31.0, -30.0, 0.5, 20.0, 21.0]))
    assert values.tolist() == [-30.0, -30.0, 0.5, 20.0, 20.0]
