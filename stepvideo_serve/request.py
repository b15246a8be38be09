"""The inputs of `ti2v` -> one validated GenerationRequest.

Everything that arrives is hostile until it has passed `parse_request`. Each refusal is an InvalidRequest of one
sentence: the input, what was expected, what came, what to do. Only the bytes of IMAGE are still unknown afterwards:
`video.image` decodes them.

Inputs are numpy arrays as Triton's Python backend gives them: BYTES is an object array of bytes; all have shape [1] but
LATENTS [latent frames, C, h, w] and ENCODE_NOISE [1, C, h, w] (FP32, h = HEIGHT / 16, w = WIDTH / 16).
"""

import math
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import ConfigError, InvalidRequest
from stepvideo_serve.geometry import VideoGeometry

# The texts of the official script: the suffix joins the prompt, the negative prompt is the unconditional branch.
DEFAULT_POSITIVE_SUFFIX: Final = (
    "画面中的主体动作表现生动自然、画面流畅、生动细节、光线统一柔和、超真实动态捕捉、"
    "大师级运镜、整体不变形、超高清、画面稳定、逼真的细节、专业级构图、超细节、清晰。"
)
DEFAULT_NEGATIVE_PROMPT: Final = (
    "动画、模糊、变形、毁容、低质量、拼贴、粒状、标志、抽象、插图、计算机生成、扭曲、"
    "动作不流畅、面部有褶皱、表情僵硬、畸形手指"
)

PRIORITY_HIGH: Final = 1
PRIORITY_NORMAL: Final = 2
PRIORITY_LOW: Final = 3

OUTPUT_MP4: Final = "mp4"
OUTPUT_FRAMES: Final = "frames"
OUTPUT_LATENTS: Final = "latents"
OUTPUTS: Final = (OUTPUT_MP4, OUTPUT_FRAMES, OUTPUT_LATENTS)

INPUT_NAMES: Final = (
    "PROMPT",
    "IMAGE",
    "NEGATIVE_PROMPT",
    "POSITIVE_SUFFIX",
    "NUM_FRAMES",
    "HEIGHT",
    "WIDTH",
    "STEPS",
    "CFG_SCALE",
    "TIME_SHIFT",
    "MOTION_SCORE",
    "SEED",
    "LATENTS",
    "ENCODE_NOISE",
    "OUTPUT",
    "PREVIEW_EVERY",
    "TIMEOUT_S",
    "REQUEST_PRIORITY",
    "REQUEST_ID",
)

_MAX_SEED: Final = 2**32 - 1  # torch's CPU generator uses 32 bits: larger seeds would repeat videos
_ALLOWED_CONTROLS: Final = "\t\n\r"
_MAX_ID_BYTES: Final = 128
_MAX_NOISE: Final = 1000.0  # far beyond any noise, and far from overflowing in the model


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

    def __post_init__(self) -> None:
        for field in fields(self):
            bound = getattr(self, field.name)
            if isinstance(bound, tuple):
                if not (len(bound) == 2 and 0 <= bound[0] <= bound[1] < math.inf):
                    raise ConfigError(f"{field.name} must be a finite range [low, high] from 0 upwards, got {bound!r}.")
            elif not 1 <= bound < math.inf:
                raise ConfigError(f"{field.name} must be a finite number from 1 upwards, got {bound!r}.")


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One accepted request; every value is inside the limits and `seed` is the one that will be used.

    `latents` fp32 [latent frames, C, h, w] and `encode_noise` fp32 [1, C, h, w] are copies owned by this object, or
    None to draw them from the seed. `timeout_s` is None without a deadline; `priority` 1 high, 2 normal, 3 low;
    `request_id` is None where a repeat of the request is a request of its own.
    """

    prompt: str
    image: bytes
    negative_prompt: str
    positive_suffix: str
    num_frames: int
    height: int
    width: int
    steps: int
    cfg_scale: float
    time_shift: float
    motion_score: float
    seed: int
    latents: NDArray[np.float32] | None
    encode_noise: NDArray[np.float32] | None
    output: str
    preview_every: int
    timeout_s: float | None
    priority: int
    request_id: str | None = None

    @property
    def geometry(self) -> VideoGeometry:
        return VideoGeometry(self.num_frames, self.height, self.width)

    @property
    def positive_prompt(self) -> str:
        """What the text encoder gets for the conditional branch: prompt and suffix without a separator."""
        return self.prompt + self.positive_suffix


def parse_request(inputs: Mapping[str, NDArray[Any]], limits: RequestLimits, latent_channels: int) -> GenerationRequest:
    """The request that `inputs` describe; absent ones get the official defaults, SEED a random 32-bit number.

    Raises InvalidRequest for an unknown, missing, malformed or out-of-range input.
    """
    _check_names(inputs)
    geometry = VideoGeometry.checked(
        _integer(inputs, "NUM_FRAMES", 102), _integer(inputs, "HEIGHT", 544), _integer(inputs, "WIDTH", 992)
    )
    _check_size(geometry, limits)
    noise_shape = (1, *geometry.latent_shape(latent_channels)[1:])
    return GenerationRequest(
        prompt=_text(inputs, "PROMPT", "", limits.max_prompt_bytes),
        image=_image(inputs, limits.max_image_bytes),
        negative_prompt=_text(inputs, "NEGATIVE_PROMPT", DEFAULT_NEGATIVE_PROMPT, limits.max_prompt_bytes),
        positive_suffix=_text(inputs, "POSITIVE_SUFFIX", DEFAULT_POSITIVE_SUFFIX, limits.max_prompt_bytes),
        num_frames=geometry.num_frames,
        height=geometry.height,
        width=geometry.width,
        steps=_integer_in(inputs, "STEPS", 50, 1, limits.max_steps),
        cfg_scale=_real_in(inputs, "CFG_SCALE", 9.0, limits.cfg_scale),
        time_shift=_real_in(inputs, "TIME_SHIFT", 7.0, limits.time_shift),
        motion_score=_real_in(inputs, "MOTION_SCORE", 5.0, limits.motion_score),
        seed=_seed(inputs),
        latents=_tensor(inputs, "LATENTS", geometry.latent_shape(latent_channels)),
        encode_noise=_tensor(inputs, "ENCODE_NOISE", noise_shape),
        output=_output(inputs),
        preview_every=_integer_in(inputs, "PREVIEW_EVERY", 0, 0, limits.max_steps),
        timeout_s=_timeout(inputs, limits.max_timeout_s),
        priority=_integer_in(inputs, "REQUEST_PRIORITY", PRIORITY_NORMAL, PRIORITY_HIGH, PRIORITY_LOW),
        request_id=_request_id(inputs),
    )


def _check_names(inputs: Mapping[str, NDArray[Any]]) -> None:
    for name in inputs:
        if name not in INPUT_NAMES:
            raise InvalidRequest(f"Inputs must be among {', '.join(INPUT_NAMES)}, got {_shown(name)}: leave it out.")
    for name in ("PROMPT", "IMAGE"):
        if name not in inputs:
            raise InvalidRequest(f"{name} is required, got a request without it: send it as BYTES of shape [1].")


def _check_size(geometry: VideoGeometry, limits: RequestLimits) -> None:
    for name, value, most in (
        ("NUM_FRAMES", geometry.num_frames, limits.max_frames),
        ("HEIGHT", geometry.height, limits.max_height),
        ("WIDTH", geometry.width, limits.max_width),
    ):
        if value > most:
            raise InvalidRequest(f"{name} must be at most {most} on this server, got {value}: lower it.")
    if geometry.tokens > limits.max_tokens:
        raise InvalidRequest(
            f"NUM_FRAMES/17*3 x HEIGHT/16 x WIDTH/16 must be at most {limits.max_tokens} tokens on this server, "
            f"got {geometry.tokens}: lower NUM_FRAMES, HEIGHT or WIDTH."
        )


def _scalar(inputs: Mapping[str, NDArray[Any]], name: str, dtype: type[np.generic], triton_type: str) -> Any:
    """The one element of an input of shape [1]."""
    array = inputs[name]
    if array.dtype != np.dtype(dtype) or array.shape != (1,):
        raise InvalidRequest(
            f"{name} must be {triton_type} of shape [1], got {array.dtype} of shape {list(array.shape)}: "
            f"send one {triton_type} value."
        )
    return array[0]


def _bytes(inputs: Mapping[str, NDArray[Any]], name: str) -> bytes:
    value = _scalar(inputs, name, np.object_, "BYTES")
    if not isinstance(value, bytes):
        raise InvalidRequest(f"{name} must hold bytes, got {type(value).__name__}: send it as a BYTES tensor.")
    return value


def _text(inputs: Mapping[str, NDArray[Any]], name: str, default: str, max_bytes: int) -> str:
    """UTF-8 text; empty is allowed, control characters other than tab, line feed and carriage return are not."""
    if name not in inputs:
        return default
    raw = _bytes(inputs, name)
    if len(raw) > max_bytes:
        raise InvalidRequest(f"{name} must be at most {max_bytes} bytes, got {len(raw)}: shorten it.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{name} must be UTF-8, got byte 0x{raw[error.start]:02x} at offset {error.start}: encode it as UTF-8."
        ) from error
    for offset, character in enumerate(text):
        if unicodedata.category(character) == "Cc" and character not in _ALLOWED_CONTROLS:
            raise InvalidRequest(
                f"{name} must be text without control characters (tab and line breaks are fine), "
                f"got U+{ord(character):04X} at character {offset}: remove it."
            )
    return text


def _image(inputs: Mapping[str, NDArray[Any]], max_bytes: int) -> bytes:
    data = _bytes(inputs, "IMAGE")
    if not data:
        raise InvalidRequest("IMAGE must be a PNG, JPEG or WebP file, got 0 bytes: send the bytes of the file.")
    if len(data) > max_bytes:
        raise InvalidRequest(
            f"IMAGE must be at most {max_bytes} bytes, got {len(data)}: send it smaller or more compressed."
        )
    return data


def _integer(inputs: Mapping[str, NDArray[Any]], name: str, default: int) -> int:
    return int(_scalar(inputs, name, np.int32, "INT32")) if name in inputs else default


def _integer_in(inputs: Mapping[str, NDArray[Any]], name: str, default: int, low: int, high: int) -> int:
    value = _integer(inputs, name, default)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be from {low} to {high}, got {value}: choose a value in that range.")
    return value


def _real(inputs: Mapping[str, NDArray[Any]], name: str) -> float:
    value = float(_scalar(inputs, name, np.float32, "FP32"))
    if not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, got {value}: send a finite number.")
    return value


def _real_in(inputs: Mapping[str, NDArray[Any]], name: str, default: float, allowed: tuple[float, float]) -> float:
    low, high = allowed
    value = _real(inputs, name) if name in inputs else default
    # The bounds are rounded as the value was: 0.1 in fp32 must equal the bound 0.1.
    if not float(np.float32(low)) <= value <= float(np.float32(high)):
        raise InvalidRequest(f"{name} must be from {low:g} to {high:g}, got {value:g}: choose a value in that range.")
    return value


def _timeout(inputs: Mapping[str, NDArray[Any]], max_timeout_s: float) -> float | None:
    if "TIMEOUT_S" not in inputs:
        return None
    value = _real(inputs, "TIMEOUT_S")
    if not 0 < value <= max_timeout_s:
        raise InvalidRequest(
            f"TIMEOUT_S must be above 0 and at most {max_timeout_s:g} seconds, got {value:g}: "
            "choose a value in that range, or leave it out for no deadline."
        )
    return value


def _seed(inputs: Mapping[str, NDArray[Any]]) -> int:
    if "SEED" not in inputs:
        return secrets.randbits(32)
    value = int(_scalar(inputs, "SEED", np.int64, "INT64"))
    if value < 0:
        raise InvalidRequest(f"SEED must be from 0 to {_MAX_SEED}, got {value}: leave it out for a random one.")
    return value


def _output(inputs: Mapping[str, NDArray[Any]]) -> str:
    if "OUTPUT" not in inputs:
        return OUTPUT_MP4
    raw = _bytes(inputs, "OUTPUT")
    for output in OUTPUTS:
        if raw == output.encode():
            return output
    raise InvalidRequest(f"OUTPUT must be one of {', '.join(OUTPUTS)}, got {_shown(raw)}: use one of these words.")


def _request_id(inputs: Mapping[str, NDArray[Any]]) -> str | None:
    if "REQUEST_ID" not in inputs:
        return None
    raw = _bytes(inputs, "REQUEST_ID")
    if not 1 <= len(raw) <= _MAX_ID_BYTES or not all(0x21 <= byte <= 0x7E for byte in raw):
        raise InvalidRequest(
            f"REQUEST_ID must be 1 to {_MAX_ID_BYTES} printable ASCII characters without spaces, got {_shown(raw)}: "
            "send a UUID, say."
        )
    return raw.decode("ascii")


def _tensor(inputs: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """A private copy of an fp32 input of exactly `shape`, or None when it is absent."""
    if name not in inputs:
        return None
    array = inputs[name]
    if array.dtype != np.dtype(np.float32) or array.shape != shape:
        raise InvalidRequest(
            f"{name} must be FP32 of shape {list(shape)} for this video size, got {array.dtype} of shape "
            f"{list(array.shape)}: send that shape or leave {name} out to draw it from SEED."
        )
    if not np.isfinite(array).all():
        count = int(array.size - np.count_nonzero(np.isfinite(array)))
        raise InvalidRequest(f"{name} must hold finite numbers, got {count} NaN or infinite ones: send finite numbers.")
    if (largest := float(np.abs(array).max(initial=0.0))) > _MAX_NOISE:
        raise InvalidRequest(f"{name} must lie within +-{_MAX_NOISE:g}, got {largest:g}: send standard normal noise.")
    return np.array(array, dtype=np.float32, order="C", copy=True)


def _shown(value: object, limit: int = 60) -> str:
    """The value as text, cut so that a hostile one cannot flood the message or the log."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
