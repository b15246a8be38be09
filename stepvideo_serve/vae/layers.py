"""Building blocks of the Video-VAE; parameter names are the official ones.

Axes everywhere: [B batch, C channels, T frames, H rows, W columns]. Every convolution is causal in time: it sees
zeros before the first frame of its chunk. Norm statistics are taken per frame.
Source: Step-Video-T2V report (arXiv 2502.10248), section 4.1 "Video-VAE".
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_GROUPS = 32
QUERY_BLOCKS_PER_FRAME = 2  # rows and columns are even where the attention is


class CausalConv3d(nn.Module):
    """3D convolution with zero padding: all in front in time, "same" in space."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.frames_before = kernel - 1
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, stride, padding=(0, kernel // 2, kernel // 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 0, self.frames_before, 0)))


class FrameNorm(nn.GroupNorm):
    """GroupNorm(32) with statistics per frame, optionally followed by SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))
        if silu:
            frames = F.silu(frames)
        return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class ResBlock(nn.Module):
    """Two norm-SiLU-convolutions and a shortcut, which is a 1x1x1 convolution where the width changes."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(channels_in)
        self.conv1 = CausalConv3d(channels_in, channels_out, 3)
        self.norm2 = FrameNorm(channels_out)
        self.conv2 = CausalConv3d(channels_out, channels_out, 3)
        if channels_in != channels_out:
            self.nin_shortcut = CausalConv3d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        h = self.conv2(self.norm2(h, silu=True))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class TokenCausalAttention(nn.Module):
    """One head over all T*H*W positions in raster order; a position sees itself and those before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = FrameNorm(channels)
        self.q = CausalConv3d(channels, channels, 1)
        self.k = CausalConv3d(channels, channels, 1)
        self.v = CausalConv3d(channels, channels, 1)
        self.proj_out = CausalConv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v))
        if torch.compiler.is_exporting():  # engines have no fused attention for heads this large
            out = attend_by_blocks(q, k, v, QUERY_BLOCKS_PER_FRAME * x.shape[2])
        else:
            out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        return x + self.proj_out(out.transpose(1, 2).unflatten(2, x.shape[2:]))


def attend_by_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: int) -> Tensor:
    """Causal softmax(q k^T / sqrt(C)) v of one head, [B, S, C] each, S a multiple of `blocks`.

    Each block of queries sees the keys up to its own end, so the largest scores are [S / blocks, S], never [S, S].
    """
    queries, keys, values = (x.unflatten(1, (blocks, -1)) for x in (q * q.shape[-1] ** -0.5, k, v))
    size = queries.shape[2]
    ahead = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    own = torch.zeros(size, size, dtype=q.dtype, device=q.device).masked_fill(ahead, float("-inf"))
    attended = []
    for i in range(blocks):
        scores = queries[:, i] @ keys[:, : i + 1].flatten(1, 2).transpose(1, 2) + F.pad(own, (i * size, 0))
        attended.append(scores.softmax(dim=-1) @ values[:, : i + 1].flatten(1, 2))
    return torch.cat(attended, dim=1)


class Middle(nn.Module):
    """Residual block, attention, residual block at the narrowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = TokenCausalAttention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class SpatialDownsample(nn.Module):
    """Halves H and W frame by frame; the padding is on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        frames = F.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1))
        return self.conv(frames).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Halves T, H and W: 2k + 1 frames become k + 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SpatialUpsample(nn.Module):
    """Doubles H and W frame by frame: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        frames = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2.0, mode="nearest")
        return self.conv(frames).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class UpsampleRefiner(nn.Module):
    """The residual block after a temporal upsampling: norms follow the convolutions, and the input is added twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels, 3)
        self.norm1 = FrameNorm(channels)
        self.conv2 = CausalConv3d(channels, channels, 3)
        self.norm2 = FrameNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x), silu=True)
        return F.silu(self.norm2(self.conv2(h)) + x) + x


class Upsample(nn.Module):
    """Doubles T, H and W: nearest neighbour, then the refiner."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3d = UpsampleRefiner(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Patchify(nn.Module):
    """Causal convolution, then 2x2x2 neighbourhoods into channels."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels_in, channels_out // 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return space_to_channels(self.conv(x), 2)


class Unpatchify(nn.Module):
    """Causal convolution, then channels into 2x2x2 neighbourhoods."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels_in, 8 * channels_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return channels_to_space(self.conv(x), 2)


def space_to_channels(x: Tensor, factor: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C * factor^3, ceil(T / factor), H / factor, W / factor], zero frames put in front."""
    x = F.pad(x, (0, 0, 0, 0, factor - 1, 0))
    x = x.unflatten(4, (-1, factor)).unflatten(3, (-1, factor)).unflatten(2, (-1, factor))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def channels_to_space(x: Tensor, factor: int) -> Tensor:
    """Inverse of `space_to_channels`: T frames become factor * T - (factor - 1), the first ones dropped."""
    x = x.unflatten(1, (-1, factor, factor, factor)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, factor - 1 :]


def average_channels(x: Tensor, channels: int) -> Tensor:
    """Mean over groups of neighbouring channels: [B, C, ...] -> [B, channels, ...]."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def repeat_channels(x: Tensor, channels: int) -> Tensor:
    """Each channel repeated next to itself: [B, C, ...] -> [B, channels, ...]."""
    repeated = x[:, :, None].expand(-1, -1, channels // x.shape[1], *x.shape[2:])
    return repeated.flatten(1, 2)


def clamp_logvar(logvar: Tensor) -> Tensor:
    """The range within which the official posterior keeps its log variance."""
    return torch.clamp(logvar, -30.0, 20.0)
