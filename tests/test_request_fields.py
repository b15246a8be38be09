"""Every field of the table at its bounds: the sentence of a refusal names the bound, and the bound is where it says.

The cases are made from the table, so that a new field is tested as soon as it is in there: by its rule at the values
just inside, just outside and far outside.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import fields as attributes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request import GenerationRequest, RequestDefaults, RequestLimits, parse_request
from stepvideo_serve.request.field import Default, Field
from stepvideo_serve.request.fields import FIELDS, fields_for
from stepvideo_serve.request.parse import field_value
from stepvideo_serve.request.rules import Choice, Identifier, ImageFile, Multiple, Noise, Quality, Range, Rule, Text

CHANNELS = 4
SIZE = {"NUM_FRAMES": 34, "HEIGHT": 64, "WIDTH": 96}
LATENT_SHAPE = (6, CHANNELS, 4, 6)
# Bounds that no other test has: one that is forgotten in a sentence or in a condition shows.
LIMITS = RequestLimits(
    max_frames=187,
    max_height=1072,
    max_width=1904,
    max_tokens=10**9,
    max_steps=173,
    max_image_bytes=1009,
    max_prompt_bytes=1013,
    cfg_scale=(1.7, 23.3),
    time_shift=(0.3, 71.1),
    motion_score=(0.7, 83.9),
    max_timeout_s=16777215.0,
    max_keep_s=8388607.0,
)
DEFAULTS = RequestDefaults(**{name.lower(): value for name, value in SIZE.items()})
KINDS: dict[str, Any] = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
Cases = Iterator[tuple[str, Any, tuple[str, ...]]]


def array(field: Field, value: Any) -> NDArray[Any]:
    return value if isinstance(value, np.ndarray) else np.array([value], KINDS[field.dtype])


def of_range(field: Field) -> Cases:
    assert isinstance(field.rule, Range)
    bounds = [np.array(bound, KINDS[field.dtype])[()] for bound in field.rule.bounds(LIMITS)]
    low, high = bounds
    ends = np.finfo(np.float32) if field.dtype == "FP32" else np.iinfo(KINDS[field.dtype])
    words = tuple(str(bound).removesuffix(".0") for bound in bounds)

    def beside(bound: Any, down: bool) -> Any:
        if field.dtype == "FP32":
            return np.nextafter(bound, np.float32(-np.inf if down else np.inf))
        return int(bound) - 1 if down else int(bound) + 1

    yield "just inside, low", beside(low, down=False) if field.rule.above_low else low, ()
    yield "just inside, high", high, ()
    yield "just outside, low", low if field.rule.above_low else beside(low, down=True), words
    yield "just outside, high", beside(high, down=False), words
    yield "far outside, low", ends.min, words
    yield "far outside, high", ends.max, words
    if field.dtype == "FP32":
        for name in ("nan", "inf", "-inf"):
            yield name, float(name), ("finite", name)


def of_multiple(field: Field) -> Cases:
    assert isinstance(field.rule, Multiple)
    step, most = field.rule.step, field.rule.most(LIMITS)
    assert most % step == 0, "choose limits that are on the grid"
    yield "just inside, low", step, ()
    yield "just inside, high", most, ()
    yield "just outside, low", 0, (str(step), "0")
    yield "just outside, high", most + step, (str(most), str(most + step))
    yield "beside the grid", step + 1, (str(step), str(step + 1))
    yield "far outside, low", -(2**31), (str(step),)
    yield "far outside, high", 2**31 - 1, (str(step),)


def of_text(field: Field) -> Cases:
    assert isinstance(field.rule, Text)
    most = field.rule.most(LIMITS)
    yield "just inside, low", b"", ()
    yield "just inside, high", b"x" * most, ()
    yield "just outside", b"x" * (most + 1), (str(most), str(most + 1))
    yield "far outside", b"x" * (100 * most), (str(most), str(100 * most))
    yield "not UTF-8", b"\xff", ("UTF-8", "0xff")


def of_image(field: Field) -> Cases:
    assert isinstance(field.rule, ImageFile)
    most = field.rule.most(LIMITS)
    yield "just inside, low", b"x", ()
    yield "just inside, high", b"x" * most, ()
    yield "just outside, low", b"", ("0 bytes",)
    yield "just outside, high", b"x" * (most + 1), (str(most), str(most + 1))
    yield "far outside", b"x" * (100 * most), (str(most), str(100 * most))


def of_identifier(field: Field) -> Cases:
    assert isinstance(field.rule, Identifier)
    most = field.rule.most
    yield "just inside, low", b"~", ()
    yield "just inside, high", b"!" * most, ()
    yield "just outside, low", b"", (f"1 to {most}",)
    yield "just outside, high", b"!" * (most + 1), (f"1 to {most}",)
    yield "far outside", b"!" * (100 * most), (f"1 to {most}",)
    yield "space", b"a b", ("without spaces",)


def of_choice(field: Field) -> Cases:
    assert isinstance(field.rule, Choice)
    for option in field.rule.options:
        yield f"inside, {option}", option.encode(), ()
        yield f"beside {option}", f"{option} ".encode(), field.rule.options
    yield "far outside", b"\xff" * 1000, field.rule.options


def of_quality(field: Field) -> Cases:
    assert isinstance(field.rule, Quality)
    most = field.rule.most(LIMITS)
    yield "inside, a name", b"balanced-2", ()
    yield "just inside, a name", b"x" * 32, ()
    yield "inside, a mask", b"mask:1101", ()
    yield "just inside, a mask", b"mask:" + b"1" * most, ()
    words = ("a preset's name", f"1 to {most} digits")
    yield "just outside, a name", b"x" * 33, words
    yield "just outside, a mask", b"mask:" + b"1" * (most + 1), words
    yield "no digits", b"mask:", words
    yield "other digits", b"mask:1201", words
    yield "upper case", b"Balanced", words
    yield "empty", b"", words
    yield "far outside", b"\xff" * 1000, words


def of_noise(field: Field) -> Cases:
    assert isinstance(field.rule, Noise)
    shape, largest = field.rule.shape(LATENT_SHAPE), np.float32(field.rule.largest)
    beyond = np.nextafter(largest, np.float32(np.inf))
    yield "just inside", np.full(shape, -largest, np.float32), ()
    yield "just outside", np.full(shape, -beyond, np.float32), (str(largest).removesuffix(".0"), str(beyond))
    yield "far outside", np.full(shape, np.finfo(np.float32).max), (str(largest).removesuffix(".0"), "3.40")
    yield "another shape", np.zeros((*shape[:-1], shape[-1] + 1), np.float32), (str(list(shape)),)


CASES: dict[type[Rule], Callable[[Field], Cases]] = {
    Range: of_range,
    Multiple: of_multiple,
    Text: of_text,
    ImageFile: of_image,
    Identifier: of_identifier,
    Choice: of_choice,
    Noise: of_noise,
    Quality: of_quality,
}


def cases() -> Iterator[Any]:
    for field in FIELDS:
        for what, value, words in CASES[type(field.rule)](field):
            yield pytest.param(field, array(field, value), words, id=f"{field.name}, {what}")


def parsed(field: Field, value: NDArray[Any]) -> Any:
    """The field's value behind the whole of `parse_request`; alone for what `ti2v` does not take."""
    if "request" not in field.needs:
        return field_value(field, {field.name: value}, LIMITS, DEFAULTS)
    texts = {name: np.array([b"x"], np.object_) for name in ("PROMPT", "IMAGE")}
    request = parse_request({**texts, field.name: value}, LIMITS, CHANNELS, DEFAULTS)
    return getattr(request, field.attribute)


@pytest.mark.parametrize(("field", "value", "words"), list(cases()))
def test_a_field_at_its_bounds(field: Field, value: NDArray[Any], words: tuple[str, ...]) -> None:
    if words:
        with pytest.raises(InvalidRequest, match=f"^{field.name} ") as refusal:
            parsed(field, value)
        assert all(word in str(refusal.value) for word in words), str(refusal.value)
        assert len(str(refusal.value)) < 300
        return
    expected = value if isinstance(field.rule, Noise) else value[0]
    found = parsed(field, value)
    np.testing.assert_array_equal(found.encode() if isinstance(found, str) else found, expected)


def settings_cases() -> Iterator[Any]:
    """The same for what the ranks get as JSON, which has no fp32 and no 32-bit integers."""
    for case in cases():
        field, value, words = case.values
        if "ranks" in field.needs:
            setting = value[0].decode("latin-1") if field.dtype == "BYTES" else value[0].item()
            yield pytest.param(field, setting, words, id=case.id)


@pytest.mark.parametrize(("field", "value", "words"), list(settings_cases()))
def test_a_setting_of_the_ranks_at_its_bounds(field: Field, value: Any, words: tuple[str, ...]) -> None:
    if not words:
        assert field.read_setting(value, LIMITS) == value
        return
    with pytest.raises(InvalidRequest, match=f"^{field.attribute} ") as refusal:
        field.read_setting(value, LIMITS)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


@pytest.mark.parametrize("field", [field for field in FIELDS if isinstance(field.rule, Range)], ids=lambda f: f.name)
def test_the_bounds_of_the_sentence_are_those_of_the_condition(field: Field) -> None:
    """Read from the sentence, sent, and taken; what lies beside them is refused in the same words."""
    assert isinstance(field.rule, Range)
    [_, outside, words] = next(case for case in of_range(field) if case[0] == "far outside, high")
    with pytest.raises(InvalidRequest) as refusal:
        parsed(field, array(field, outside))
    number = r"(-?[\d.]+(?:e[+-]?\d+)?)"
    found = re.search(rf"(?:from|above) {number} (?:to|and at most) {number}", str(refusal.value))
    assert found is not None, str(refusal.value)
    low, high = (float(text) for text in found.groups())
    for bound in (high,) if field.rule.above_low else (low, high):
        assert parsed(field, array(field, bound)) == array(field, bound)[0]
    assert words == found.groups()


def test_seeds_above_32_bits_are_refused() -> None:
    [seed] = (field for field in FIELDS if field.name == "SEED")
    assert parsed(seed, np.array([2**32 - 1], np.int64)) == 4294967295
    with pytest.raises(InvalidRequest, match="SEED must be from 0 to 4294967295, got 4294967296"):
        parsed(seed, np.array([2**32], np.int64))


def test_the_request_has_an_attribute_for_every_field() -> None:
    expected = [field.attribute for field in fields_for("request")]
    assert [attribute.name for attribute in attributes(GenerationRequest)] == expected


def test_names_attributes_and_flags_are_unique_and_defaults_exist() -> None:
    for kind in ("name", "attribute"):
        assert len({getattr(field, kind) for field in FIELDS}) == len(FIELDS)
    for field in FIELDS:
        assert field.name.isupper()
        assert field.attribute.islower()
        assert field.help
        assert "quote" in field.needs or "request" in field.needs
    configured = {field.attribute for field in FIELDS if field.default is Default.CONFIGURED}
    assert configured == {attribute.name for attribute in attributes(RequestDefaults)}


@pytest.mark.parametrize("field", [field for field in FIELDS if not isinstance(field.default, Default)])
def test_constant_defaults_are_what_the_rules_allow(field: Field) -> None:
    if field.default is not None:
        value = field.default.encode() if isinstance(field.default, str) else field.default
        assert field.rule.check(field.name, value, RequestLimits()) == field.default


def test_absent_inputs_are_filled_in_from_the_defaults() -> None:
    texts = {name: np.array([b"x"], np.object_) for name in ("PROMPT", "IMAGE")}
    own = replace(DEFAULTS, steps=3, cfg_scale=2.0, time_shift=5.0, motion_score=1.0)
    request = parse_request(texts, LIMITS, CHANNELS, own)
    assert {name.name: getattr(request, name.name) for name in attributes(own)} == {
        "num_frames": 34,
        "height": 64,
        "width": 96,
        "steps": 3,
        "cfg_scale": 2.0,
        "time_shift": 5.0,
        "motion_score": 1.0,
    }
