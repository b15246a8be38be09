"""Sections of serve.toml about requests: [limits], [defaults] and [card]."""

import math
from dataclasses import dataclass, fields

from stepvideo_serve.errors import ConfigError


@dataclass(frozen=True)
class RequestLimits:
    """What the server accepts. Bounds are inclusive; ConfigError for a bound below 1 (or a range upside down).

    `max_tokens` is what decides memory and time: tokens = latent frames x HEIGHT/16 x WIDTH/16. The default is 204
    frames at 544x992, the longest clip of the published measurements (102 frames are 37,944 tokens).
    """

    max_frames: int = 204
    max_height: int = 1088
    max_width: int = 1920
    max_tokens: int = 75_888
    max_steps: int = 200
    max_image_bytes: int = 32 * 2**20
    max_prompt_bytes: int = 16 * 2**10
    cfg_scale: tuple[float, float] = (1.0, 30.0)
    time_shift: tuple[float, float] = (0.1, 100.0)
    motion_score: tuple[float, float] = (0.0, 100.0)
    max_timeout_s: float = 86_400.0
    max_keep_s: float = 3_600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            bound = getattr(self, field.name)
            if isinstance(bound, tuple):
                if not (len(bound) == 2 and 0 <= bound[0] <= bound[1] < math.inf):
                    raise ConfigError(f"{field.name} must be a finite range [low, high] from 0 upwards, got {bound!r}.")
            elif not 1 <= bound < math.inf:
                raise ConfigError(f"{field.name} must be a finite number from 1 upwards, got {bound!r}.")


@dataclass(frozen=True)
class RequestDefaults:
    """What the server fills in where a request leaves an input out; those of the official pipeline, if not configured.

    They must lie within the limits (`parse.check_defaults`). Frames; pixels; steps; the rest without a unit.
    """

    num_frames: int = 102
    height: int = 544
    width: int = 992
    steps: int = 50
    cfg_scale: float = 9.0
    time_shift: float = 7.0
    motion_score: float = 5.0


@dataclass(frozen=True)
class CheckpointCard:
    """What the card of the served checkpoint states; a request for something else is served with a warning.

    sizes      frames, height, width in pixels, of each size that it states; none: any
    cfg_scale  the lowest and the highest guidance that it states; [0, 0]: any
    """

    sizes: tuple[tuple[int, int, int], ...] = ()
    cfg_scale: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for size in self.sizes:
            if min(size) < 1:
                raise ConfigError(f"sizes must hold [frames, height, width] from 1 upwards, got {list(size)}.")
        low, high = self.cfg_scale
        if not 0 <= low <= high:
            raise ConfigError(f"cfg_scale must be a range [low, high] from 0 upwards, got {[low, high]}.")
