"""How the toy Video-VAE begins, and how its decoder is first trained without its dearest level.

The official architecture does nine tenths of the decoder's work in the last level, at full resolution. It is left out
at first: a linear map (`PixelHead`) reads pixels off the stream that enters it. `attach_pixels` then sets the last
level and the output layers so that the whole decoder computes about the same.
"""

import torch
from torch import Tensor, nn

from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.layers import SpatialUpsample, channels_to_space, repeat_channels
from stepvideo_serve.vae.model import WARM_UP_FRAMES, VideoDecoder, VideoEncoder, VideoVAE

TOY_VAE = VAEConfig(
    z_channels=8,
    num_res_blocks=1,
    encoder_stem=32,
    encoder_widths=(32, 32, 64, 64),
    decoder_widths=(64, 64, 64, 32),
)
LOGVAR = -9.0
ANCHOR = 60.0  # height of the border pattern, against streams of about 1
READOUT_GAIN = 2.0
SILENT = ("conv2.conv.weight", "proj_out.conv.weight")  # ends of residual branches: they begin as the identity


def initialise(vae: VideoVAE, seed: int) -> None:
    """Sets every parameter. Convolutions see the present frame only at first, so that what is learned from single
    images holds for clips; residual branches begin silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                if name.endswith("conv3d.norm2.weight"):
                    parameter.fill_(0.2)
            elif name.endswith(SILENT) and "conv3d" not in name:
                parameter.zero_()
            else:
                _random_present(parameter, generator)
        for module in vae.decoder.modules():
            if isinstance(module, SpatialUpsample):
                nn.init.dirac_(module.conv.weight)
        fix_logvar(vae.encoder)


def fix_logvar(encoder: VideoEncoder) -> None:
    """Makes the log variance the constant LOGVAR: its rows of the last convolution cancel the shortcut's average."""
    z, conv = encoder.config.z_channels, encoder.conv_out.conv
    group = encoder.config.patch_channels // (2 * z)
    with torch.no_grad():
        conv.weight[z:] = 0
        conv.bias[z:] = LOGVAR  # type: ignore[index]  # Conv3d types its bias as optional
        for row in range(z, 2 * z):
            conv.weight[row, row * group : (row + 1) * group, -1, 1, 1] = -1 / group


def drop_logvar_gradient(encoder: VideoEncoder) -> None:
    """Keeps the log variance where `fix_logvar` put it."""
    z, conv = encoder.config.z_channels, encoder.conv_out.conv
    for parameter in (conv.weight, conv.bias):
        if parameter is not None and parameter.grad is not None:
            parameter.grad[z:] = 0


def copy_time_phase(decoder: VideoDecoder) -> None:
    """Single images train only the second of the two frames that `conv_unpatchify` makes of one: copy it."""
    conv = decoder.conv_unpatchify.conv.conv
    with torch.no_grad():
        for parameter in (conv.weight, conv.bias):
            assert parameter is not None
            phases = parameter.unflatten(0, (-1, 2, 4))
            phases[:, 0] = phases[:, 1]


def standardise(vae: VideoVAE, latents: Tensor) -> None:
    """Scales latent channels to a standard deviation of 1 over `latents` [B, T', z, h, w], exactly: `encoder.conv_out`
    divides and `decoder.conv_in` multiplies, shortcuts included. Means stay: shifting them would change what the zero
    padding of the decoder's first convolution stands for."""
    deviation = latents.transpose(1, 2).flatten(2).transpose(0, 1).flatten(1).std(dim=1)
    z = len(deviation)
    with torch.no_grad():
        out, group = vae.encoder.conv_out.conv, vae.encoder.config.patch_channels // (2 * z)
        repeats = vae.decoder.config.patch_channels // z
        into = vae.decoder.conv_in.conv
        assert out.bias is not None
        for channel, scale in enumerate(deviation.tolist()):
            out.weight[channel] /= scale
            out.bias[channel] /= scale
            out.weight[channel, channel * group : (channel + 1) * group, -1, 1, 1] += (1 / scale - 1) / group
            into.weight[:, channel] *= scale
            into.weight[channel * repeats : (channel + 1) * repeats, channel, -1, 1, 1] += scale - 1


def round_to_bf16(module: nn.Module) -> None:
    """Gives every parameter the nearest value that bf16 has."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())


class PixelHead(nn.Module):
    """The stream before the decoder's last level -> pixels, linear in each position."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.conv = nn.Conv3d(config.decoder_widths[1], 3, 1)
        with torch.no_grad():
            self.conv.weight.normal_(std=config.decoder_widths[1] ** -0.5, generator=torch.Generator().manual_seed(1))
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, decoder: VideoDecoder, latents: Tensor) -> Tensor:
        """latents [B, T', z, h, w], T' = 1 or 3 -> pixels [B, T, 3, 16h, 16w], T = 1 or 17."""
        return self.conv(stream(decoder, latents)).transpose(1, 2)[:, WARM_UP_FRAMES:]  # type: ignore[no-any-return]


def stream(decoder: VideoDecoder, latents: Tensor) -> Tensor:
    """What enters the decoder's last level: [B, C, T + 3, 16h, 16w]."""
    z = latents.transpose(1, 2)
    x = decoder.conv_in(z) + repeat_channels(z, decoder.config.patch_channels)
    x = decoder.conv_unpatchify(x) + channels_to_space(repeat_channels(x, 8 * decoder.config.decoder_widths[-1]), 2)
    x = decoder.mid(x)
    for level in reversed(decoder.up[1:]):
        x = level(x)
    return x  # type: ignore[no-any-return]


def attach_pixels(decoder: VideoDecoder, head: PixelHead, latents: Tensor, seed: int) -> None:
    """Sets the last level, `norm_out` and `conv_out` so that the decoder computes about what `head` reads.

    The final group norm has groups of two channels and would erase plain colours. Here the first of each pair carries
    a value v, the second -v and, at the border of the frame, the constant ANCHOR: mean and deviation of the group are
    then those of the anchor, and v passes in proportion. As x = silu(x) - silu(-x), six pairs carry +R, -R, +G, -G,
    +B, -B for an exact read-out; the others carry random mixtures of the stream, for training to use.
    `latents` [B, T', z, h, w] give the frame size and the typical deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = dict(decoder.named_parameters())
    branch = f"up.0.block.{decoder.config.num_res_blocks}"
    with torch.no_grad():
        rows = _pair_rows(head, decoder.config.decoder_widths[0] // 2, generator)
        mixture = torch.stack([rows, -rows], dim=1).flatten(0, 1)
        for name in ("up.1.upsample.conv.weight", "up.1.upsample.conv.bias"):
            weights[name].copy_(torch.einsum("oi,i...->o...", mixture, weights[name]))

        weights[f"{branch}.norm2.weight"][0] = 0.0  # channel 0 of the branch is a constant silu(1)
        weights[f"{branch}.norm2.bias"][0] = 1.0
        border = torch.full((3, 3), -1.0)
        border[1, 1] = 8.0
        conv = weights[f"{branch}.conv2.conv.weight"]
        conv[:, 0] = 0
        conv[1::2, 0, -1] = border * ANCHOR / (3 * nn.functional.silu(torch.ones(())))

        x = decoder.up[0](stream(decoder, latents))
        pairs = x.transpose(1, 2).flatten(0, 1).unflatten(1, (-1, 2)).flatten(2)
        mean, deviation = pairs.mean(dim=(0, 2)), pairs.std(dim=2).mean(dim=0)
        decoder.norm_out.weight[0::2] = READOUT_GAIN * deviation
        decoder.norm_out.weight[1::2] = 1.0
        decoder.norm_out.bias[0::2] = READOUT_GAIN * mean
        decoder.norm_out.bias[1::2] = 0.0
        out = decoder.conv_out.conv
        out.weight.zero_()
        for channel in range(3):
            out.weight[channel, 4 * channel, -1, 1, 1] = 1 / READOUT_GAIN
            out.weight[channel, 4 * channel + 2, -1, 1, 1] = -1 / READOUT_GAIN
        out.bias.copy_(head.conv.bias)  # type: ignore[union-attr,arg-type]


def _pair_rows(head: PixelHead, pairs: int, generator: torch.Generator) -> Tensor:
    """One row per pair of channels: plus and minus each colour, then random mixtures of unit length."""
    weight = head.conv.weight.flatten(1)
    colours = torch.stack([weight, -weight], dim=1).flatten(0, 1)
    mixtures = torch.randn(pairs - len(colours), weight.shape[1], generator=generator)
    return torch.cat([colours, mixtures / mixtures.norm(dim=1, keepdim=True)])


def _random_present(weight: Tensor, generator: torch.Generator) -> None:
    """Normal with the variance 1 / fan-in; of a kernel over time only the last tap."""
    taps = weight[:, :, -1:] if weight.dim() == 5 else weight
    values = torch.randn(taps.shape, generator=generator) / taps[0].numel() ** 0.5
    weight.zero_()
    taps.copy_(values)
