"""Dimensions of the DiT, read from the official `transformer/config.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.weights.json_file import integer, read_json_object

HEAD_DIM = 128
ROPE_SPLIT = (64, 32, 32)
FFN_MULTIPLE = 4
BLOCK_NORM_EPS = 1e-5
OUTER_NORM_EPS = 1e-6
QK_NORM_EPS = 1e-6
BLOCKS_PREFIX = "transformer_blocks."  # of the keys of blocks in a checkpoint


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
        captions = values.get("caption_channels")
        head_dim, conditioned = values.get("attention_head_dim"), values.get("use_additional_conditions")
        two_captions = isinstance(captions, list) and len(captions) == 2 and all(type(c) is int for c in captions)
        if head_dim != HEAD_DIM or conditioned is not True or not isinstance(captions, list) or not two_captions:
            raise CheckpointError(
                f"{source} must describe Step-Video-TI2V (attention_head_dim {HEAD_DIM}, use_additional_conditions "
                f"true, two caption_channels), got {head_dim}, {conditioned}, {captions}: use its own weights."
            )
        return cls(
            num_heads=integer(values, "num_attention_heads", source),
            num_layers=integer(values, "num_layers", source),
            in_channels=integer(values, "in_channels", source),
            out_channels=integer(values, "out_channels" if values.get("out_channels") else "in_channels", source),
            patch_size=integer(values, "patch_size", source),
            llm_channels=captions[0],
            clip_channels=captions[1],
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields of `transformer/config.json`, by which `from_dict` makes the same configuration."""
        return {
            "_class_name": "StepVideoModel",
            "num_attention_heads": self.num_heads,
            "attention_head_dim": HEAD_DIM,
            "num_layers": self.num_layers,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "patch_size": self.patch_size,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": OUTER_NORM_EPS,
            "caption_channels": [self.llm_channels, self.clip_channels],
            "attention_type": "parallel",
            "use_additional_conditions": True,
        }

    @classmethod
    def load(cls, path: Path) -> "DiTConfig":
        return cls.from_dict(read_json_object(path), str(path))
