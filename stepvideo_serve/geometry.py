"""Pixels and frames -> latent -> tokens: every x16, 17 -> 3 and rounding rule of the model.

The Video-VAE maps chunks of 17 frames to 3 latent frames and 16 x 16 pixels to one latent cell; chunks are
independent. The DiT sees one token per latent cell and frame (patch size 1).
Source: Step-Video-TI2V technical report (arXiv 2503.11251), section on the Video-VAE.
"""

from dataclasses import dataclass

from stepvideo_serve.errors import InvalidRequest

PIXELS_PER_LATENT = 16
FRAMES_PER_CHUNK = 17
LATENTS_PER_CHUNK = 3


@dataclass(frozen=True)
class VideoGeometry:
    """The size of one video, in frames and pixels, and what follows from it."""

    num_frames: int
    height: int
    width: int

    @property
    def chunks(self) -> int:
        return self.num_frames // FRAMES_PER_CHUNK

    @property
    def latent_frames(self) -> int:
        return self.chunks * LATENTS_PER_CHUNK

    @property
    def latent_height(self) -> int:
        return self.height // PIXELS_PER_LATENT

    @property
    def latent_width(self) -> int:
        return self.width // PIXELS_PER_LATENT

    @property
    def tokens(self) -> int:
        return self.latent_frames * self.latent_height * self.latent_width

    def latent_shape(self, channels: int) -> tuple[int, int, int, int]:
        """[latent frames, channels, latent height, latent width]."""
        return (self.latent_frames, channels, self.latent_height, self.latent_width)

    @classmethod
    def checked(cls, num_frames: int, height: int, width: int) -> "VideoGeometry":
        """The geometry, or InvalidRequest naming the nearest allowed value of the first one off the grid."""
        for name, value, step in (
            ("NUM_FRAMES", num_frames, FRAMES_PER_CHUNK),
            ("HEIGHT", height, PIXELS_PER_LATENT),
            ("WIDTH", width, PIXELS_PER_LATENT),
        ):
            check_multiple(name, value, step)
        return cls(num_frames, height, width)


def check_multiple(name: str, value: int, step: int) -> None:
    """InvalidRequest, naming the nearest allowed values, unless `value` is a positive multiple of `step`."""
    if value < step or value % step:
        raise InvalidRequest(f"{name} must be a positive multiple of {step}, got {value}: use {_nearest(value, step)}.")


def _nearest(value: int, step: int) -> str:
    """The allowed neighbours of `value`, as text: "96 or 112"."""
    below = max(value // step * step, step)
    above = below if value < step else below + step
    return str(below) if below == above else f"{below} or {above}"
