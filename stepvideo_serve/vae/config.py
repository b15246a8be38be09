"""Widths of the Video-VAE. The official code holds them in its source, so they are read off the weights' shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from stepvideo_serve.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class VAEConfig:
    """Channels per resolution level, from the pixels inwards; both halves have four levels in official weights."""

    z_channels: int
    num_res_blocks: int
    encoder_stem: int
    encoder_widths: tuple[int, ...]
    decoder_widths: tuple[int, ...]

    @property
    def patch_channels(self) -> int:
        """Channels between the latent and the (un)patchify layers."""
        return 32 * self.z_channels

    @classmethod
    def from_shapes(cls, shapes: Shapes, source: str) -> "VAEConfig":
        """Raises CheckpointError when the keys are not those of a version 2 Video-VAE."""

        def width(key: str, axis: int = 0) -> int:
            if key not in shapes:
                raise CheckpointError(f"{source} must hold a Video-VAE v2 with key {key}, which is missing.")
            return shapes[key][axis]

        levels = {half: _count(rf"{half}\.(\d+)\.block\.0\.conv1", shapes) for half in ("encoder.down", "decoder.up")}
        return cls(
            z_channels=width("decoder.conv_in.conv.weight", axis=1),
            num_res_blocks=_count(r"encoder\.down\.0\.block\.(\d+)\.conv1", shapes),
            encoder_stem=width("encoder.conv_in.conv.weight"),
            encoder_widths=tuple(
                width(f"encoder.down.{i}.block.0.conv1.conv.weight") for i in range(levels["encoder.down"])
            ),
            decoder_widths=tuple(
                width(f"decoder.up.{i}.block.0.conv1.conv.weight") for i in range(levels["decoder.up"])
            ),
        )


def _count(pattern: str, shapes: Shapes) -> int:
    matches = (re.match(pattern, key) for key in shapes)
    return len({m.group(1) for m in matches if m})
