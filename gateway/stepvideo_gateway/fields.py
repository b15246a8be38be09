"""A request of the Videos API -> the options of a generation.

Fields come as text from forms and as values from JSON; both mean the same. Sizes and lengths that the model does not
have are refused with the nearest that it has; a length in seconds becomes the nearest one, and the answer has the real
length. What a request leaves out, the server decides (its defaults).
"""

import base64
import binascii
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image, UnidentifiedImageError

from stepvideo_client import MOVEMENTS, with_camera
from stepvideo_client.fields import INPUTS
from stepvideo_gateway.errors import BadRequest

REFERENCE: Final = "input_reference"
FPS: Final = 25
FRAMES_PER_UNIT: Final = 17
PIXELS_PER_UNIT: Final = 16
MAX_SEED: Final = 2**32 - 1
MAX_PROMPT_CHARACTERS: Final = 16_384
URGENCIES: Final = {"high": 1, "normal": 2, "low": 3}
IMAGES: Final = ("PNG", "JPEG", "WEBP")

# The API's name -> the option of the client, for what is handed on as a number.
NUMBERS: Final[Mapping[str, tuple[str, type[int] | type[float], float, float]]] = {
    "num_inference_steps": ("steps", int, 1, math.inf),
    "guidance_scale": ("cfg_scale", float, 0, math.inf),
    "flow_shift": ("time_shift", float, 0, math.inf),
    "motion_score": ("motion_score", float, 0, math.inf),
    "seed": ("seed", int, 0, MAX_SEED),
}
TEXTS: Final = ("negative_prompt", "quality")
PREVIEW: Final = "preview_format"
FIELDS: Final = (
    *("prompt", "model", "seconds", "size", "input_reference", "num_frames", "fps", "camera", "priority"),
    *NUMBERS,
    *TEXTS,
    PREVIEW,
)
# Where a sentence of the server names an input, which field of the API is meant.
INPUT_OF: Final[Mapping[str, str]] = {
    "NUM_FRAMES": "num_frames",
    "HEIGHT": "size",
    "WIDTH": "size",
    "STEPS": "num_inference_steps",
    "CFG_SCALE": "guidance_scale",
    "TIME_SHIFT": "flow_shift",
    "MOTION_SCORE": "motion_score",
    "NEGATIVE_PROMPT": "negative_prompt",
    "QUALITY": "quality",
    "SEED": "seed",
    "PROMPT": "prompt",
    "IMAGE": "input_reference",
}


@dataclass(frozen=True)
class Asked:
    """A request that is in order. `options`: of the generation, complete but for the seed and what the server decides;
    `urgency`: 1 high, 2 normal, 3 low."""

    prompt: str
    image: bytes
    options: dict[str, Any]
    urgency: int

    @property
    def fingerprint(self) -> str:
        """Equal for two requests that ask for the same video."""
        content = json.dumps([self.prompt, self.options, self.urgency, hashlib.sha256(self.image).hexdigest()])
        return hashlib.sha256(content.encode()).hexdigest()


def asked(given: Mapping[str, Any], model: str, defaults: Mapping[str, Any]) -> Asked:
    """The request that `given` describes: fields by name, `input_reference` as bytes or text. `defaults`: the server's
    num_frames, height and width. Raises BadRequest."""
    for name in given:
        if name not in FIELDS:
            raise BadRequest(f"There is no field {_shown(name)}; the fields are {', '.join(FIELDS)}.", name)
    if given.get("model") not in (None, "", model):
        raise BadRequest(f"model must be {model!r}, got {given['model']!r}.", "model")
    prompt = _prompt(given)
    options: dict[str, Any] = {"num_frames": _frames(given, defaults), **_size(given, defaults)}
    for name, (option, kind, low, high) in NUMBERS.items():
        if (value := given.get(name)) not in (None, ""):
            options[option] = number(name, value, kind, low, high)
    for name in TEXTS:
        if (value := given.get(name)) not in (None, ""):
            options[name] = _text(name, value)
    options |= _previews(given)
    return Asked(prompt, picture(given.get("input_reference")), options, urgency(given.get("priority")))


def number(name: str, value: Any, kind: type[int] | type[float], low: float, high: float) -> int | float:
    """A number in its range, from text or as it is. Raises BadRequest."""
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        read = kind(value)
        if not (low <= read <= high and math.isfinite(read)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        bounds = f"from {low:g} upwards" if high == math.inf else f"from {low:g} to {high:.0f}"
        what = "a whole number" if kind is int else "a number"
        raise BadRequest(f"{name} must be {what} {bounds}, got {_shown(value)}.", name) from None
    return read


def urgency(value: Any) -> int:
    """priority: high, normal, low or 1, 2, 3 -> 1, 2, 3. Raises BadRequest."""
    if value in (None, ""):
        return URGENCIES["normal"]
    known = {**URGENCIES, **{str(number): number for number in URGENCIES.values()}}
    if str(value) not in known:
        raise BadRequest(f"priority must be one of {', '.join(URGENCIES)}, got {_shown(value)}.", "priority")
    return known[str(value)]


def picture(value: Any) -> bytes:
    """The bytes of the first image: a file's, or those of a data URL. Raises BadRequest."""
    if isinstance(value, Mapping):
        if value.get("file_id"):
            raise BadRequest("input_reference must be a file or a data URL: there are no file ids here.", REFERENCE)
        value = value.get("image_url")
    if isinstance(value, str) and value:
        value = _of_data_url(value)
    if not isinstance(value, bytes) or not value:
        raise BadRequest("input_reference is required: the first image, as a file or a data URL.", REFERENCE)
    try:
        with Image.open(io.BytesIO(value), formats=IMAGES):
            return value
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        begin = value[:8].hex(" ")
        raise BadRequest(
            f"input_reference must be a PNG, JPEG or WebP picture, got bytes {begin} ...", REFERENCE
        ) from None


def picture_kind(content: bytes) -> str:
    """The media type of a picture that `picture` has let through."""
    with Image.open(io.BytesIO(content), formats=IMAGES) as opened:
        return Image.MIME[opened.format or "PNG"]


def is_address(value: Any) -> bool:
    """Whether the picture would have to be fetched from somewhere."""
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def as_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """What decides about a video, besides prompt and picture, under the names of the API's fields: with them the same
    video can be asked for again. `options`: of a generation."""
    named = {name: option for name, (option, *_) in NUMBERS.items()} | {name: name for name in ("num_frames", *TEXTS)}
    given = {name: options[option] for name, option in named.items() if option in options}
    return {"size": f"{options['width']}x{options['height']}", **given}


def seconds_of(num_frames: int) -> str:
    """The real length, as the API writes it: without needless zeros."""
    return f"{num_frames / FPS:.2f}".rstrip("0").rstrip(".")


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a job's options those that decide what the video is."""
    return {name: value for name, value in options.items() if name not in (PREVIEW, "preview_every")}


def param_of(sentence: str) -> str | None:
    """The field that a sentence of the server is about."""
    found = re.match(r"[A-Z_]+", sentence)
    return INPUT_OF.get(found.group()) if found else None


def _prompt(given: Mapping[str, Any]) -> str:
    prompt = _text("prompt", given.get("prompt"))
    if not prompt.strip():
        raise BadRequest("prompt is required: what happens in the video.", "prompt")
    camera = given.get("camera")
    if camera in (None, ""):
        return prompt
    if camera not in MOVEMENTS:
        raise BadRequest(f"camera must be one of {', '.join(MOVEMENTS)}, got {_shown(camera)}.", "camera")
    return with_camera(prompt, camera)


def _previews(given: Mapping[str, Any]) -> dict[str, Any]:
    """Asks for a preview with every step, where previews are wanted; the gateway decides how many it shows."""
    value, formats = given.get(PREVIEW), INPUTS[PREVIEW].choices
    if value in (None, ""):
        return {}
    if value not in formats:
        raise BadRequest(f"{PREVIEW} must be one of {', '.join(formats)}, got {_shown(value)}.", PREVIEW)
    return {PREVIEW: value, "preview_every": 1}


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_PROMPT_CHARACTERS:
        raise BadRequest(f"{name} must be text of at most {MAX_PROMPT_CHARACTERS} characters.", name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{name} must be text, got half of a surrogate pair.", name) from None
    return value


def _frames(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> int:
    if given.get("fps") not in (None, "") and number("fps", given["fps"], float, 0, math.inf) != FPS:
        raise BadRequest(f"fps must be {FPS}, the model's own, got {_shown(given['fps'])}.", "fps")
    if given.get("num_frames") not in (None, ""):
        if given.get("seconds") not in (None, ""):
            raise BadRequest("num_frames and seconds both say how long the video is: give one of them.", "num_frames")
        frames = int(number("num_frames", given["num_frames"], int, 1, math.inf))
        nearest = max(1, round(frames / FRAMES_PER_UNIT)) * FRAMES_PER_UNIT
        if frames != nearest:
            raise BadRequest(
                f"num_frames must be a multiple of {FRAMES_PER_UNIT}, got {frames}: {nearest} is the nearest.",
                "num_frames",
            )
        return frames
    if given.get("seconds") in (None, ""):
        return int(defaults["num_frames"])
    seconds = number("seconds", given["seconds"], float, 0, 3600)
    return max(1, round(seconds * FPS / FRAMES_PER_UNIT)) * FRAMES_PER_UNIT


def _size(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, int]:
    size = given.get("size")
    if size in (None, "", "auto"):
        return {"height": int(defaults["height"]), "width": int(defaults["width"])}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) if isinstance(size, str) else None
    if found is None:
        raise BadRequest(f'size must be WIDTHxHEIGHT such as "992x544", got {_shown(size)}.', "size")
    width, height = int(found[1]), int(found[2])
    nearest = [max(1, round(side / PIXELS_PER_UNIT)) * PIXELS_PER_UNIT for side in (width, height)]
    if [width, height] != nearest:
        raise BadRequest(
            f"size must have sides that are multiples of {PIXELS_PER_UNIT}, got {size}: {nearest[0]}x{nearest[1]} is "
            "the nearest.",
            "size",
        )
    return {"height": height, "width": width}


def _of_data_url(url: str) -> bytes:
    found = re.match(r"data:[\w/+.;=-]*;base64,", url[:200])
    if found is None:
        kind = "an address" if url.startswith(("http://", "https://")) else "text"
        raise BadRequest(
            f"input_reference must be a file or a base64 data URL, got {kind}: send the picture.", REFERENCE
        )
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except binascii.Error:
        raise BadRequest("input_reference must be a base64 data URL, got broken base64.", REFERENCE) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
