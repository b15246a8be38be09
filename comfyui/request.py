"""The inputs of a node -> a request of the Videos API, and the key by which its result is found again."""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .errors import BadInput

DEFAULT_QUALITY = "server's default"
QUALITIES = (DEFAULT_QUALITY, "exact", "balanced", "fast")
PRIORITIES = ("normal", "high", "low")
MAX_SEED = 2**32 - 1
PREVIEWS = "webp"  # small pictures that move
PIXELS_PER_UNIT = 16
FRAMES_PER_UNIT = 17


@dataclass(frozen=True)
class Request:
    """`fields`: of POST /v1/videos, as text; `picture`: the first image as PNG."""

    fields: Mapping[str, str]
    picture: bytes

    @property
    def key(self) -> str:
        """The same for two requests that ask for the very same video, in whatever workflow."""
        content = json.dumps([dict(self.fields), hashlib.sha256(self.picture).hexdigest()], sort_keys=True)
        return f"comfyui-{hashlib.sha256(content.encode()).hexdigest()}"


def fields_of(
    *,
    width: int,
    height: int,
    num_frames: int,
    steps: int,
    guidance: float,
    shift: float,
    quality: str,
    other_preset: str,
    priority: str,
) -> dict[str, str]:
    """What a quote and a video are both asked with."""
    fields = {
        "size": f"{width}x{height}",
        "num_frames": str(num_frames),
        "num_inference_steps": str(steps),
        "guidance_scale": _number(guidance),
        "flow_shift": _number(shift),
        "priority": priority,
    }
    preset = other_preset.strip() or ("" if quality == DEFAULT_QUALITY else quality)
    return {**fields, "quality": preset} if preset else fields


def video_fields(
    common: Mapping[str, str], prompt: str, negative_prompt: str, motion_score: float, seed: int
) -> dict[str, str]:
    """`common`, with what decides what is to be seen. Raises BadInput."""
    if not prompt.strip():
        raise BadInput("prompt must say what happens in the video, got no text: write a sentence.")
    fields = {**common, "prompt": prompt, "motion_score": _number(motion_score), "seed": str(seed)}
    fields["preview_format"] = PREVIEWS
    return {**fields, "negative_prompt": negative_prompt} if negative_prompt.strip() else fields


def png_of(image: Any) -> bytes:
    """The first picture of a batch, ComfyUI's IMAGE: [B, H, W, 3 or 4] from 0 to 1, as PNG. Raises BadInput."""
    if image.ndim != 4 or image.shape[0] < 1 or image.shape[3] not in (3, 4):
        raise BadInput(f"image must be a batch [B, H, W, 3 or 4] with a picture, got {list(image.shape)}.")
    levels = (image[0].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def blank_png() -> bytes:
    """A small picture, for quotes: these depend on no picture, but the API asks for one."""
    file = io.BytesIO()
    Image.new("RGB", (PIXELS_PER_UNIT, PIXELS_PER_UNIT)).save(file, "PNG")
    return file.getvalue()


def _number(value: float) -> str:
    return f"{value:.6g}"
