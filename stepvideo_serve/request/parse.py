"""The inputs of `ti2v` -> one validated GenerationRequest.

Everything that arrives is hostile until it has passed `parse_request`. Each refusal is an InvalidRequest of one
sentence: the input, what was expected, what came, what to do. Only the bytes of IMAGE are still unknown afterwards:
`video.image` decodes them.

Inputs are numpy arrays as Triton's Python backend gives them: BYTES is an object array of bytes; all have shape [1] but
LATENTS [latent frames, C, h, w] and ENCODE_NOISE [1, C, h, w] (FP32, h = HEIGHT / 16, w = WIDTH / 16).
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.request.field import Default, Field
from stepvideo_serve.request.fields import MAX_SEED, fields_for
from stepvideo_serve.request.limits import CheckpointCard, RequestDefaults, RequestLimits
from stepvideo_serve.request.presets import Preset, preset_of
from stepvideo_serve.request.rules import Noise, as_fp32, exact, shortened

Inputs = Mapping[str, NDArray[Any]]

SIZES = ("num_frames", "height", "width")


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One accepted request; every value is inside the limits and `seed` is the one that will be used.

    Its attributes are those of the fields that a "request" needs. `latents` fp32 [latent frames, C, h, w] and
    `encode_noise` fp32 [1, C, h, w] are copies owned by this object, or None to draw them from the seed. `timeout_s` is
    None without a deadline; `priority` 1 high, 2 normal, 3 low; `request_id` is None where a repeat of the request is a
    request of its own; `max_response_bytes` is None without a bound; `keep_s` is 0 for a run that
    ends with its last caller.
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
    quality: str
    seed: int
    latents: NDArray[np.float32] | None
    encode_noise: NDArray[np.float32] | None
    output: str
    preview_every: int
    preview_format: str
    timeout_s: float | None
    priority: int
    request_id: str | None = None
    keep_s: float = 0.0
    max_response_bytes: int | None = None

    @property
    def geometry(self) -> VideoGeometry:
        return VideoGeometry(self.num_frames, self.height, self.width)

    @property
    def positive_prompt(self) -> str:
        """What the text encoder gets for the conditional branch: prompt and suffix without a separator."""
        return self.prompt + self.positive_suffix


def parse_request(
    inputs: Inputs, limits: RequestLimits, latent_channels: int, defaults: RequestDefaults | None = None
) -> GenerationRequest:
    """The request that `inputs` describe; absent ones get `defaults` (None: the official ones), SEED a random 32-bit
    number.

    Raises InvalidRequest for an unknown, missing, malformed or out-of-range input.
    """
    expected = fields_for("request")
    check_names(inputs, expected)
    filled = defaults or RequestDefaults()
    # The shapes of the noise follow from the sizes: they come first.
    values = {
        field.attribute: field_value(field, inputs, limits, filled) for field in expected if field.attribute in SIZES
    }
    geometry = VideoGeometry(*(values[size] for size in SIZES))
    check_tokens(geometry, limits)
    latent_shape = geometry.latent_shape(latent_channels)
    for field in expected:
        if isinstance(field.rule, Noise) and field.name in inputs:
            field.rule.checked_shape(field.name, inputs[field.name], latent_shape)
        if field.attribute not in values:
            values[field.attribute] = field_value(field, inputs, limits, filled)
    return GenerationRequest(**values)


def with_timeout(request: GenerationRequest, timeout_s: float | None, limits: RequestLimits) -> GenerationRequest:
    """The request with a deadline that came beside its inputs; of both the shorter holds. Raises InvalidRequest for one
    that TIMEOUT_S may not have."""
    if timeout_s is None:
        return request
    [field] = (field for field in fields_for("request") if field.attribute == "timeout_s")
    given: float = field.rule.check(field.name, as_fp32(timeout_s), limits)
    return replace(request, timeout_s=given if request.timeout_s is None else min(given, request.timeout_s))


def check_keep(request: GenerationRequest) -> None:
    """InvalidRequest for a run that is to outlive its caller without a name."""
    if request.keep_s > 0 and request.request_id is None:
        raise InvalidRequest(
            f"KEEP_S = {request.keep_s:g} must come with a REQUEST_ID, got none: nobody could find the run again."
        )


def read_request_id(inputs: Inputs, limits: RequestLimits) -> str:
    """The one input of `ti2v_cancel`. Raises InvalidRequest for anything else."""
    [field] = (field for field in fields_for("request") if field.attribute == "request_id")
    check_names(inputs, (replace(field, default=Default.REQUIRED),))
    request_id: str = field.read(inputs[field.name], limits)
    return request_id


def check_names(inputs: Iterable[str], expected: Iterable[Field]) -> None:
    """InvalidRequest for an input that is not expected, and for a required one that is missing."""
    names = [field.name for field in expected]
    for name in inputs:
        if name not in names:
            raise InvalidRequest(f"Inputs must be among {', '.join(names)}, got {shortened(name)}: leave it out.")
    for field in expected:
        if field.default is Default.REQUIRED and field.name not in inputs:
            raise InvalidRequest(
                f"{field.name} is required, got a request without it: send it as {field.dtype} of shape [1]."
            )


def check_tokens(geometry: VideoGeometry, limits: RequestLimits) -> None:
    """InvalidRequest for a video of more tokens than the server takes."""
    if geometry.tokens > limits.max_tokens:
        raise InvalidRequest(
            f"NUM_FRAMES/17*3 x HEIGHT/16 x WIDTH/16 must be at most {limits.max_tokens} tokens on this server, "
            f"got {geometry.tokens}: lower NUM_FRAMES, HEIGHT or WIDTH."
        )


def check_defaults(defaults: RequestDefaults, limits: RequestLimits) -> None:
    """InvalidRequest for defaults that the server would refuse if they were sent."""
    for field in fields_for("request"):
        if field.default is Default.CONFIGURED:
            field.rule.check(field.attribute, field.default_in(defaults), limits)
    check_tokens(VideoGeometry(*(getattr(defaults, size) for size in SIZES)), limits)


def check_quality(request: GenerationRequest, presets: Mapping[str, Preset]) -> Preset:
    """The preset that the request's QUALITY means. Raises InvalidRequest where it means none, or one that does not hold
    for the request."""
    return preset_of(request.quality, presets, request.steps, request.cfg_scale, request.time_shift)


def card_warnings(request: GenerationRequest, card: CheckpointCard) -> list[str]:
    """A sentence for each input that lies outside what the card of the checkpoint states."""
    sentences = []
    size = (request.num_frames, request.height, request.width)
    if card.sizes and size not in card.sizes:
        stated = " or ".join(_size(stated) for stated in card.sizes)
        sentences.append(
            f"The card of this checkpoint states {stated}, got {_size(size)}: expect less of it, or ask for a stated "
            "size."
        )
    low, high = card.cfg_scale
    if high > 0 and not as_fp32(low) <= request.cfg_scale <= as_fp32(high):
        stated = exact(low) if low == high else f"{exact(low)} to {exact(high)}"
        sentences.append(
            f"The card of this checkpoint states a CFG_SCALE of {stated}, got {exact(request.cfg_scale)}: expect less "
            "of it, or ask for a stated one."
        )
    return sentences


def field_value(field: Field, inputs: Inputs, limits: RequestLimits, defaults: RequestDefaults) -> Any:
    """The field's value in `inputs`, or what stands in for an absent one. Raises InvalidRequest."""
    if field.name not in inputs:
        return secrets.randbelow(MAX_SEED + 1) if field.default is Default.RANDOM else field.default_in(defaults)
    if isinstance(field.rule, Noise):
        return field.rule.check(field.name, inputs[field.name], limits)
    return field.read(inputs[field.name], limits)


def _size(size: tuple[int, int, int]) -> str:
    frames, height, width = size
    return f"{frames} frames of {height}x{width}"
