"""parse_request: defaults, ranges, and nothing but InvalidRequest for whatever arrives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from stepvideo_serve import request as request_module
from stepvideo_serve.errors import ConfigError, InvalidRequest
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.request import (
    DEFAULT_NEGATIVE_PROMPT,
    DEFAULT_POSITIVE_SUFFIX,
    INPUT_NAMES,
    GenerationRequest,
    RequestLimits,
    parse_request,
    with_timeout,
)

CHANNELS = 4
Inputs = dict[str, NDArray[Any]]


def text(value: str | bytes) -> NDArray[Any]:
    return np.array([value.encode() if isinstance(value, str) else value], dtype=np.object_)


def int32(value: int) -> NDArray[Any]:
    return np.array([value], dtype=np.int32)


def fp32(value: float) -> NDArray[Any]:
    return np.array([value], dtype=np.float32)


def parse(limits: RequestLimits | None = None, **extra: NDArray[Any]) -> GenerationRequest:
    """The request of PROMPT, IMAGE, a tiny size and `extra`."""
    return parse_inputs(extra, limits)


def parse_inputs(extra: Inputs, limits: RequestLimits | None = None) -> GenerationRequest:
    inputs = {
        "PROMPT": text("a cat"),
        "IMAGE": text(b"not looked at"),
        "NUM_FRAMES": int32(34),
        "HEIGHT": int32(64),
        "WIDTH": int32(96),
    }
    return parse_request({**inputs, **extra}, limits or RequestLimits(), CHANNELS)


def test_a_byte_order_mark_is_no_part_of_a_text() -> None:
    """Editors write one; as tokens of the prompt, the mark would make another video of the same words."""
    for name, attribute in (("PROMPT", "prompt"), ("NEGATIVE_PROMPT", "negative_prompt")):
        assert getattr(parse_inputs({name: text("\ufeff一只猫")}), attribute) == "一只猫"
    assert parse(PROMPT=text("a\ufeffcat")).prompt == "a\ufeffcat", "in the middle the mark is a character"


def test_prompt_and_image_are_enough() -> None:
    request = parse_request({"PROMPT": text("一只猫"), "IMAGE": text(b"\x89PNG")}, RequestLimits(), 64)
    assert request.prompt == "一只猫"
    assert request.image == b"\x89PNG"
    assert request.geometry == VideoGeometry(102, 544, 992)
    assert (request.steps, request.cfg_scale, request.time_shift, request.motion_score) == (50, 9.0, 7.0, 5.0)
    assert (request.output, request.preview_every, request.timeout_s, request.priority) == ("mp4", 0, None, 2)
    assert request.preview_format == "jpeg"
    assert request.latents is None
    assert request.encode_noise is None
    assert request.request_id is None
    assert request.positive_prompt == "一只猫" + DEFAULT_POSITIVE_SUFFIX
    assert request.negative_prompt == DEFAULT_NEGATIVE_PROMPT


def test_every_input_reaches_its_field() -> None:
    latents = np.arange(6 * CHANNELS * 4 * 6, dtype=np.float32).reshape(6, CHANNELS, 4, 6)
    noise = -np.ones((1, CHANNELS, 4, 6), dtype=np.float32)
    request = parse(
        NEGATIVE_PROMPT=text(""),
        POSITIVE_SUFFIX=text(" sharp\r\n\tand calm"),
        STEPS=int32(4),
        CFG_SCALE=fp32(1),
        TIME_SHIFT=fp32(13),
        MOTION_SCORE=fp32(0),
        SEED=np.array([2**32 - 1], dtype=np.int64),
        LATENTS=latents,
        ENCODE_NOISE=noise,
        OUTPUT=text("frames"),
        PREVIEW_EVERY=int32(2),
        PREVIEW_FORMAT=text("webp"),
        TIMEOUT_S=fp32(1.5),
        REQUEST_PRIORITY=int32(1),
        REQUEST_ID=text("7b0c/1"),
    )
    assert (request.num_frames, request.height, request.width) == (34, 64, 96)
    assert request.negative_prompt == ""
    assert request.positive_prompt == "a cat sharp\r\n\tand calm"
    assert (request.steps, request.cfg_scale, request.time_shift, request.motion_score) == (4, 1.0, 13.0, 0.0)
    assert request.seed == 2**32 - 1
    assert request.latents is not None
    assert request.encode_noise is not None
    np.testing.assert_array_equal(request.latents, latents)
    np.testing.assert_array_equal(request.encode_noise, noise)
    assert (request.output, request.preview_every, request.timeout_s, request.priority) == ("frames", 2, 1.5, 1)
    assert (request.request_id, request.preview_format) == ("7b0c/1", "webp")


def test_given_tensors_are_copied() -> None:
    latents = np.zeros((6, CHANNELS, 4, 6), dtype=np.float32)
    request = parse(LATENTS=latents)
    latents[:] = 1
    assert request.latents is not None
    assert not request.latents.any()


def test_seeds_differ_and_are_in_range() -> None:
    seeds = {parse().seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_default_texts_are_the_official_ones(shared: Path) -> None:
    official = json.loads((shared / "goldens/tiny-a/goldens.json").read_text(encoding="utf-8"))["e2e"]
    assert official["pos_magic"] == DEFAULT_POSITIVE_SUFFIX
    assert official["neg_magic"] == DEFAULT_NEGATIVE_PROMPT


def test_bounds_are_inclusive_in_fp32() -> None:
    assert parse(TIME_SHIFT=fp32(0.1)).time_shift == pytest.approx(0.1)
    assert parse(CFG_SCALE=fp32(30)).cfg_scale == 30
    assert parse(TIMEOUT_S=fp32(86_400)).timeout_s == 86_400
    assert parse(STEPS=int32(200), PREVIEW_EVERY=int32(200)).steps == 200


BAD_INPUTS: list[tuple[str, NDArray[Any], str]] = [
    ("PROMPT", np.array(["str"], dtype=np.object_), "must hold bytes, got str"),
    ("PROMPT", np.array([b"fixed"]), "must be BYTES"),
    ("PROMPT", np.array([b"a", b"b"], dtype=np.object_), r"got object of shape \[2\]"),
    ("PROMPT", np.array([[b"a"]], dtype=np.object_), r"got object of shape \[1, 1\]"),
    ("PROMPT", text(b"caf\xe9"), "got byte 0xe9 at offset 3"),
    ("PROMPT", text(b"\xed\xa0\x80"), "must be UTF-8"),
    ("PROMPT", text("nul\0"), r"got U\+0000 at character 3"),
    ("NEGATIVE_PROMPT", text("esc\x1b[31m"), r"got U\+001B"),
    ("POSITIVE_SUFFIX", text("c1\x85"), r"got U\+0085"),
    ("PROMPT", text("x" * (16 * 1024 + 1)), "at most 16384 bytes, got 16385"),
    ("IMAGE", text(b""), "got 0 bytes"),
    ("NUM_FRAMES", int32(100), "use 85 or 102"),
    ("HEIGHT", int32(-16), "use 16"),
    ("WIDTH", int32(97), "use 96 or 112"),
    ("NUM_FRAMES", int32(221), "at most 204"),
    ("HEIGHT", int32(1104), "at most 1088"),
    ("WIDTH", int32(1936), "at most 1920"),
    ("WIDTH", np.array([96], dtype=np.int64), "must be INT32"),
    ("STEPS", int32(0), "from 1 to 200, got 0"),
    ("STEPS", int32(201), "from 1 to 200"),
    ("STEPS", np.array([], dtype=np.int32), r"shape \[0\]"),
    ("STEPS", np.array(4, dtype=np.int32), r"shape \[\]"),
    ("CFG_SCALE", fp32(float("nan")), "finite number, got nan"),
    ("CFG_SCALE", fp32(0.5), "from 1 to 30"),
    ("TIME_SHIFT", fp32(float("inf")), "finite number, got inf"),
    ("TIME_SHIFT", fp32(0), "from 0.1 to 100"),
    ("MOTION_SCORE", fp32(-1), "from 0 to 100"),
    ("MOTION_SCORE", np.array([5.0]), "must be FP32"),
    ("SEED", np.array([-1], dtype=np.int64), "leave it out for a random one"),
    ("SEED", int32(1), "must be INT64"),
    ("OUTPUT", text("gif"), "mp4, frames, latents"),
    ("PREVIEW_EVERY", int32(-1), "from 0 to 200"),
    ("PREVIEW_FORMAT", text("gif"), "jpeg, webp"),
    ("TIMEOUT_S", fp32(0), "above 0"),
    ("TIMEOUT_S", fp32(float("-inf")), "finite"),
    ("TIMEOUT_S", fp32(1e9), "at most 86400 seconds"),
    ("REQUEST_PRIORITY", int32(4), "from 1 to 3"),
    ("REQUEST_ID", text(""), "1 to 128 printable ASCII characters without spaces, got b''"),
    ("REQUEST_ID", text("a b"), "printable ASCII"),
    ("REQUEST_ID", text("猫"), "printable ASCII"),
    ("REQUEST_ID", text("x" * 129), "1 to 128"),
    ("LATENTS", np.zeros((6, CHANNELS, 4, 7), np.float32), r"shape \[6, 4, 4, 6\] .* shape \[6, 4, 4, 7\]"),
    ("LATENTS", np.zeros((6, CHANNELS, 4, 6), np.float64), "got float64"),
    ("LATENTS", np.full((6, CHANNELS, 4, 6), np.nan, np.float32), "576 NaN or infinite"),
    ("LATENTS", np.full((6, CHANNELS, 4, 6), -3e38, np.float32), r"within \+-1000, got 3e\+38"),
    ("ENCODE_NOISE", np.zeros((6, CHANNELS, 4, 6), np.float32), r"shape \[1, 4, 4, 6\]"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_INPUTS)
def test_a_bad_input_is_refused_by_name(name: str, value: NDArray[Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}\b.*{message}"):
        parse_inputs({name: value})


@pytest.mark.parametrize("missing", ["PROMPT", "IMAGE"])
def test_a_missing_input_is_refused_by_name(missing: str) -> None:
    inputs = {"PROMPT": text("a"), "IMAGE": text(b"b")}
    del inputs[missing]
    with pytest.raises(InvalidRequest, match=f"^{missing} is required"):
        parse_request(inputs, RequestLimits(), CHANNELS)


def test_an_unknown_input_is_refused_and_shown_shortened() -> None:
    with pytest.raises(InvalidRequest, match="got 'PROMTPROMT") as caught:
        parse_inputs({"PROMT" * 1000: text("a cat")})
    assert len(str(caught.value)) < 500


def test_a_large_image_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most 10 bytes, got 11"):
        parse(RequestLimits(max_image_bytes=10), IMAGE=text(b"x" * 11))


def test_the_token_limit_binds_within_the_other_limits() -> None:
    tokens = VideoGeometry(34, 64, 96).tokens
    assert parse(RequestLimits(max_tokens=tokens)).geometry.tokens == tokens
    with pytest.raises(InvalidRequest, match=f"at most {tokens - 1} tokens .* got {tokens}"):
        parse(RequestLimits(max_tokens=tokens - 1))


def test_default_limits_allow_the_longest_published_clip_in_both_orientations() -> None:
    for height, width in ((544, 992), (992, 544)):
        request = parse(NUM_FRAMES=int32(204), HEIGHT=int32(height), WIDTH=int32(width))
        assert request.geometry.tokens == RequestLimits().max_tokens


@pytest.mark.parametrize(
    ("field", "bound"),
    [("max_steps", 0), ("max_timeout_s", float("nan")), ("cfg_scale", (2.0, 1.0)), ("motion_score", (-1.0, 5.0))],
)
def test_limits_that_make_no_sense_are_a_config_error(field: str, bound: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be"):
        RequestLimits(**{field: bound})


def test_every_declared_input_has_a_field() -> None:
    renamed = {"REQUEST_PRIORITY": "priority"}
    fields = set(request_module.GenerationRequest.__dataclass_fields__)
    assert {renamed.get(name, name.lower()) for name in INPUT_NAMES} == fields


SHAPES = st.sampled_from([(), (0,), (1,), (2,), (1, 1), (6, CHANNELS, 4, 6), (1, CHANNELS, 4, 6)])
DTYPES = st.sampled_from([np.dtype(code) for code in ("?", "i1", "i4", ">i4", "i8", "f2", "f4", "f8", "S3", "U2")])
WORDS = st.one_of(st.binary(max_size=40), st.text(max_size=20), st.none(), st.integers(), st.floats())
ARRAYS = st.one_of(
    hnp.arrays(dtype=DTYPES, shape=SHAPES),
    hnp.arrays(dtype=np.dtype(np.object_), shape=SHAPES.filter(lambda shape: len(shape) < 3), elements=WORDS),
    st.integers(-(2**31), 2**31 - 1).map(int32),
    st.integers(-40, 400).map(int32),
    st.floats(width=32).map(fp32),
    st.binary(max_size=40).map(text),
)


@settings(deadline=None)
@given(inputs=st.dictionaries(st.sampled_from([*INPUT_NAMES, "OTHER"]), ARRAYS, max_size=6))
def test_only_invalid_request_escapes(inputs: Inputs) -> None:
    try:
        request = parse_inputs(inputs)
    except InvalidRequest:
        return
    limits = RequestLimits()
    assert request.geometry == VideoGeometry.checked(request.num_frames, request.height, request.width)
    assert 1 <= request.steps <= limits.max_steps
    assert 1 <= request.cfg_scale <= 30
    assert 0 <= request.motion_score <= 100
    assert 0 <= request.seed < 2**32
    assert request.output in ("mp4", "frames", "latents")
    assert request.timeout_s is None or 0 < request.timeout_s <= limits.max_timeout_s
    assert request.latents is None or np.isfinite(request.latents).all()


def test_of_two_deadlines_the_shorter_holds() -> None:
    limits = RequestLimits()
    assert with_timeout(parse(), None, limits).timeout_s is None
    assert with_timeout(parse(), 2.5, limits).timeout_s == 2.5
    asked = parse(TIMEOUT_S=fp32(60.0))
    assert [with_timeout(asked, timeout_s, limits).timeout_s for timeout_s in (None, 2.5, 600.0)] == [60.0, 2.5, 60.0]
    with pytest.raises(InvalidRequest, match="TIMEOUT_S must be above 0 and at most 86400 seconds, got 90000"):
        with_timeout(asked, 90_000.0, limits)
