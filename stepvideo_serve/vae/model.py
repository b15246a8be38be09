"""The two networks of the Video-VAE, and both under the official key names `encoder.*` and `decoder.*`.

Encoder: up to 17 frames -> the posterior of up to 3 latent frames. Decoder: 3 latent frames -> 17 frames (1 -> 1).
"""

from itertools import pairwise

from torch import Tensor, nn

from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.layers import (
    CausalConv3d,
    Downsample,
    FrameNorm,
    Middle,
    Patchify,
    ResBlock,
    SpatialDownsample,
    SpatialUpsample,
    Unpatchify,
    Upsample,
    average_channels,
    channels_to_space,
    clamp_logvar,
    repeat_channels,
    space_to_channels,
)

ENCODER_TEMPORAL_LEVELS = (1, 2)
DECODER_TEMPORAL_LEVELS = (2, 3)
WARM_UP_FRAMES = 3


class DecoderLevel(nn.Module):
    """Residual blocks of one resolution, then an upsampling (none at level 0, the pixels)."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, upsample: nn.Module | None) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        if upsample is not None:
            self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class VideoDecoder(nn.Module):
    """Latent -> pixels, about in [-1, 1] and not clamped."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        widths = (*config.decoder_widths, config.decoder_widths[-1])
        self.conv_in = CausalConv3d(config.z_channels, config.patch_channels, 3)
        self.conv_unpatchify = Unpatchify(config.patch_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            DecoderLevel(widths[i + 1], widths[i], config.num_res_blocks + 1, _upsample(i, config))
            for i in range(len(config.decoder_widths))
        )
        self.norm_out = FrameNorm(widths[0])
        self.conv_out = CausalConv3d(widths[0], 3, 3)

    def forward(self, latents: Tensor) -> Tensor:
        """latents [B, T', z, h, w], T' = 1 or 3 -> pixels [B, T, 3, 16h, 16w], T = 1 or 17."""
        z = latents.transpose(1, 2)
        x = self.conv_in(z) + repeat_channels(z, self.config.patch_channels)
        x = self.conv_unpatchify(x) + channels_to_space(repeat_channels(x, 8 * self.config.decoder_widths[-1]), 2)
        x = self.mid(x)
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(self.norm_out(x, silu=True))
        return x.transpose(1, 2)[:, WARM_UP_FRAMES:]


def _upsample(level: int, config: VAEConfig) -> nn.Module | None:
    if level == 0:
        return None
    channels = config.decoder_widths[level]
    return Upsample(channels) if level in DECODER_TEMPORAL_LEVELS else SpatialUpsample(channels)


class EncoderLevel(nn.Module):
    """Residual blocks of one resolution, then a downsampling (none at the last level)."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, downsample: nn.Module | None) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))
        if downsample is not None:
            self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class VideoEncoder(nn.Module):
    """Pixels in [-1, 1] -> mean and log variance of the latent."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.encoder_stem, *config.encoder_widths)
        self.conv_in = CausalConv3d(3, config.encoder_stem, 3)
        self.down = nn.ModuleList(
            EncoderLevel(widths[i], widths[i + 1], config.num_res_blocks, _downsample(i, config))
            for i in range(len(config.encoder_widths))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = FrameNorm(widths[-1])
        self.conv_patchify = Patchify(widths[-1], config.patch_channels)
        self.conv_out = CausalConv3d(config.patch_channels, 2 * config.z_channels, 3)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, T, 3, H, W], T = 1 or 17 -> mean and log variance, each [B, T', z, H/16, W/16], T' = 1 or 3."""
        x = self.conv_in(pixels.transpose(1, 2))
        for level in self.down:
            x = level(x)
        x = self.norm_out(self.mid(x), silu=True)
        x = self.conv_patchify(x) + average_channels(space_to_channels(x, 2), self.config.patch_channels)
        x = self.conv_out(x) + average_channels(x, 2 * self.config.z_channels)
        mean, logvar = x.transpose(1, 2).chunk(2, dim=2)
        return mean, clamp_logvar(logvar)


def _downsample(level: int, config: VAEConfig) -> nn.Module | None:
    if level == len(config.encoder_widths) - 1:
        return None
    channels = config.encoder_widths[level]
    return Downsample(channels) if level in ENCODER_TEMPORAL_LEVELS else SpatialDownsample(channels)


class VideoVAE(nn.Module):
    """Holder of the two networks, used for their keys and shapes; they run apart."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.encoder = VideoEncoder(config)
        self.decoder = VideoDecoder(config)
