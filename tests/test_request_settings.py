"""What the ranks get of a request: out of it, as JSON, and in again, whatever the JSON holds."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request import GenerationRequest, RequestLimits, checked_settings, parse_request, rank_settings
from stepvideo_serve.request.fields import fields_for

LIMITS = RequestLimits()
NAMES = [field.attribute for field in fields_for("ranks")]
DEFAULTS = {
    "steps": 50,
    "cfg_scale": 9.0,
    "time_shift": 7.0,
    "motion_score": 5.0,
    "quality": "exact",
    "preview_every": 0,
}


def parsed(**numbers: int | float) -> GenerationRequest:
    inputs: dict[str, Any] = {name: np.array([b"x"], np.object_) for name in ("PROMPT", "IMAGE")}
    for name, value in numbers.items():
        inputs[name] = np.array([value], np.int32 if isinstance(value, int) else np.float32)
    return parse_request(inputs, LIMITS, 4)


def test_the_settings_are_those_of_the_request() -> None:
    assert rank_settings(parsed()) == DEFAULTS
    given = rank_settings(parsed(STEPS=3, CFG_SCALE=2.5, TIME_SHIFT=0.1, MOTION_SCORE=20.0, PREVIEW_EVERY=2))
    assert list(given.values()) == [3, 2.5, float(np.float32(0.1)), 20.0, "exact", 2]


def test_they_survive_the_way_as_json() -> None:
    sent = rank_settings(parsed(STEPS=3, CFG_SCALE=1.1, TIME_SHIFT=0.1, MOTION_SCORE=100.0))
    received = checked_settings(json.loads(json.dumps(sent)), LIMITS)
    assert received == sent
    assert [type(value) for value in received.values()] == [int, float, float, float, str, int]


def test_a_whole_number_is_a_number() -> None:
    assert checked_settings({**DEFAULTS, "cfg_scale": 4}, LIMITS)["cfg_scale"] == 4.0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps must be from 1 to 200, got 0"),
    ({"steps": 10**5000}, "steps must be from 1 to 200, got an integer of more than 64 bits"),
    ({"steps": 4.0}, "steps must be an integer, got 4.0"),
    ({"steps": True}, "steps must be an integer, got True"),
    ({"steps": None}, "steps must be an integer, got None"),
    ({"steps": "4"}, "steps must be an integer, got '4'"),
    ({"cfg_scale": math.nan}, "cfg_scale must be a finite number, got nan"),
    ({"cfg_scale": 10**400}, "cfg_scale must be a finite number, got inf"),
    ({"cfg_scale": -(10**400)}, "cfg_scale must be a finite number, got -inf"),
    ({"cfg_scale": False}, "cfg_scale must be a number, got False"),
    ({"cfg_scale": [10**5000]}, "cfg_scale must be a number, got list: send a number"),
    ({"time_shift": 0.0999}, "time_shift must be from 0.1 to 100, got 0.0999"),
    ({"quality": 1}, "quality must be text, got 1: send text"),
    ({"quality": "mask:12"}, "quality must be a preset's name .*, got b?'mask:12'"),
    ({"motion_score": {}}, "motion_score must be a number, got dict"),
    ({"preview_every": -1}, "preview_every must be from 0 to 200, got -1"),
    ({"seed": 7}, "Settings must be steps, .*, got 'seed': leave it out"),
    ({"x" * 10_000: 7}, "Settings must be .*, got 'xxx.*: leave it out"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_what_is_wrong_is_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refusal:
        checked_settings({**DEFAULTS, **wrong}, LIMITS)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_setting_is_named(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"got none of the name {name}: send all"):
        checked_settings({key: value for key, value in DEFAULTS.items() if key != name}, LIMITS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@settings(deadline=None)
@given(values=st.dictionaries(st.sampled_from([*NAMES, "seed"]), JSON))
def test_only_invalid_request_escapes(values: dict[str, Any]) -> None:
    try:
        received = checked_settings({**DEFAULTS, **values}, LIMITS)
    except InvalidRequest:
        return
    assert all(math.isfinite(value) for value in received.values() if not isinstance(value, str))
    assert list(received) == NAMES
