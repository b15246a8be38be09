"""What a caller may ask for: the table of fields, their rules, and the request that is made of them.

limits    what the server accepts, what it fills in, what the checkpoint's card states: sections of serve.toml
rules     range, grid, choice, text, image, noise, identifier: each checks a value and says what it accepts
field     Field: one input
fields    FIELDS, the table of all inputs; a new input begins there
presets   presets of quality, and which one a request means
parse     the inputs of `ti2v` -> GenerationRequest
asked_outputs  the outputs asked for by name, against the one that OUTPUT makes
response_size  how large the message with a result is, and whether its caller can take it
settings  the part of a request that the ranks get
"""

from stepvideo_serve.request.field import Default, Field, Setting
from stepvideo_serve.request.fields import (
    DEFAULT_NEGATIVE_PROMPT,
    DEFAULT_POSITIVE_SUFFIX,
    FIELDS,
    INPUT_NAMES,
    MAX_TEXT_TOKENS,
    OUTPUT_FRAMES,
    OUTPUT_LATENTS,
    OUTPUT_MP4,
    OUTPUTS,
    PREVIEW_FORMATS,
    PREVIEW_JPEG,
    PREVIEW_WEBP,
    PRIORITY_HIGH,
    PRIORITY_LOW,
    PRIORITY_NORMAL,
    fields_for,
)
from stepvideo_serve.request.limits import CheckpointCard, RequestDefaults, RequestLimits
from stepvideo_serve.request.parse import (
    GenerationRequest,
    card_warnings,
    check_defaults,
    check_keep,
    check_names,
    check_quality,
    field_value,
    parse_request,
    with_timeout,
)
from stepvideo_serve.request.settings import checked_settings, chosen_preset, rank_settings

__all__ = [
    "DEFAULT_NEGATIVE_PROMPT",
    "DEFAULT_POSITIVE_SUFFIX",
    "FIELDS",
    "INPUT_NAMES",
    "MAX_TEXT_TOKENS",
    "OUTPUTS",
    "OUTPUT_FRAMES",
    "OUTPUT_LATENTS",
    "OUTPUT_MP4",
    "PREVIEW_FORMATS",
    "PREVIEW_JPEG",
    "PREVIEW_WEBP",
    "PRIORITY_HIGH",
    "PRIORITY_LOW",
    "PRIORITY_NORMAL",
    "CheckpointCard",
    "Default",
    "Field",
    "GenerationRequest",
    "RequestDefaults",
    "RequestLimits",
    "Setting",
    "card_warnings",
    "check_defaults",
    "check_keep",
    "check_names",
    "check_quality",
    "checked_settings",
    "chosen_preset",
    "field_value",
    "fields_for",
    "parse_request",
    "rank_settings",
    "with_timeout",
]
