"""The settings of a request that whoever denoises needs: out of the request, and in again at the other end.

A setting goes as JSON, by the name of its attribute. A field of the table that the "ranks" need is a setting, so that a
new one goes the whole way without an edit here.
"""

from collections.abc import Mapping

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request.field import Setting
from stepvideo_serve.request.fields import fields_for
from stepvideo_serve.request.limits import RequestLimits
from stepvideo_serve.request.parse import GenerationRequest
from stepvideo_serve.request.presets import Preset, preset_of
from stepvideo_serve.request.rules import shortened


def rank_settings(request: GenerationRequest) -> dict[str, Setting]:
    """Attribute -> value of every field that the ranks need, in the order of the table."""
    return {field.attribute: getattr(request, field.attribute) for field in fields_for("ranks")}


def checked_settings(values: Mapping[str, object], limits: RequestLimits) -> dict[str, Setting]:
    """The settings of a JSON object, each with its type and inside the limits; all of them must be there.

    Raises InvalidRequest for a name that is unknown or missing, a wrong type, NaN, or a value out of range.
    """
    expected = {field.attribute: field for field in fields_for("ranks")}
    names = ", ".join(expected)
    for name in values:
        if name not in expected:
            raise InvalidRequest(f"Settings must be {names}, got {shortened(name)}: leave it out.")
    for name in expected:
        if name not in values:
            raise InvalidRequest(f"Settings must be {names}, got none of the name {name}: send all of them.")
    return {name: field.read_setting(values[name], limits) for name, field in expected.items()}


def chosen_preset(settings: Mapping[str, Setting], presets: Mapping[str, Preset]) -> Preset:
    """What the settings' QUALITY means among `presets`. Raises InvalidRequest where it means none of them, or one that
    does not hold for the other settings."""
    steps, cfg_scale, time_shift = (float(settings[name]) for name in ("steps", "cfg_scale", "time_shift"))
    return preset_of(str(settings["quality"]), presets, int(steps), cfg_scale, time_shift)
