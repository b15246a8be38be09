"""Dimensions of the DiT, read from the official `transformer/config.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepvideo_serve.errors import CheckpointError

HEAD_DIM = 128
ROPE_SPLIT = (64, 32, 32)
FFN_MULTIPLE = 4
BLOCK_NORM_EPS = 1e-5
OUTER_NORM_EPS = 1e-6
QK_NORM_EPS = 1e-6


@dataclass(frozen=True)
class DiTConfig:
    """The part of the configuration that varies between checkpoints; the constants above are fixed in the model.

    llm_channels and clip_channels are the widths of the two text encoders (`caption_channels` in the file).
    """

    num_heads: int
    num_layers: int
    in_channels: int
    out_channels: int
    patch_size: int
    llm_channels: int
    clip_channels: int

    @property
    def width(self) -> int:
        return self.num_heads * HEAD_DIM

    @property
    def patch_values(self) -> int:
        """Latent values in one token, of the latent alone (the condition has as many)."""
        return self.in_channels * self.patch_size**2

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> "DiTConfig":
        """Raises CheckpointError when `values` describes another variant of the model than text + image to video."""
        try:
            captions = values["caption_channels"]
            head_dim = values["attention_head_dim"]
            conditioned = values["use_additional_conditions"]
            config = cls(
                num_heads=values["num_attention_heads"],
                num_layers=values["num_layers"],
                in_channels=values["in_channels"],
                out_channels=values.get("out_channels") or values["in_channels"],
                patch_size=values["patch_size"],
                llm_channels=captions[0] if isinstance(captions, list) else 0,
                clip_channels=captions[1] if isinstance(captions, list) else 0,
            )
        except KeyError as error:
            raise CheckpointError(
                f"{source} must name {error.args[0]}, which is missing: use the official file."
            ) from None
        if head_dim != HEAD_DIM or not conditioned or not isinstance(captions, list):
            raise CheckpointError(
                f"{source} must describe Step-Video-TI2V (attention_head_dim {HEAD_DIM}, use_additional_conditions "
                f"true, two caption_channels), got {head_dim}, {conditioned}, {captions}: use its own weights."
            )
        return config

    @classmethod
    def load(cls, path: Path) -> "DiTConfig":
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} must be the DiT's JSON configuration, could not be read: {error}.") from None
        return cls.from_dict(values, str(path))
