"""How large the message with a result is, before and after."""

from dataclasses import replace

import numpy as np
import pytest

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request import GenerationRequest, RequestLimits, parse_request
from stepvideo_serve.request.response_size import check_fits, least_response_bytes, response_bytes
from stepvideo_serve.video.mp4 import standard_size
from tests.mini import bytes_of

CHANNELS = 64


@pytest.fixture(scope="module")
def asked() -> GenerationRequest:
    """102 frames of 544x992."""
    return parse_request({"PROMPT": bytes_of(b""), "IMAGE": bytes_of(b"x")}, RequestLimits(), CHANNELS)


@pytest.mark.parametrize(
    ("output", "payload"),
    [("frames", 102 * 540 * 960 * 3), ("latents", 18 * 64 * 34 * 62 * 4), ("mp4", 102 * 8)],
)
def test_what_a_result_has_at_the_least(asked: GenerationRequest, output: str, payload: int) -> None:
    least = least_response_bytes(replace(asked, output=output), CHANNELS, standard_size(544, 992))
    assert payload < least < payload + 4096


@pytest.mark.parametrize("output", ["frames", "latents", "mp4"])
def test_a_bound_is_kept_to_the_byte(asked: GenerationRequest, output: str) -> None:
    asked = replace(asked, output=output)
    least = least_response_bytes(asked, CHANNELS, (544, 992))
    check_fits(asked, CHANNELS, (544, 992))
    check_fits(replace(asked, max_response_bytes=least), CHANNELS, (544, 992))
    with pytest.raises(InvalidRequest, match=f"MAX_RESPONSE_BYTES = {least - 1}, but takes at least {least} bytes: "):
        check_fits(replace(asked, max_response_bytes=least - 1), CHANNELS, (544, 992))


def test_bytes_and_arrays_are_counted() -> None:
    nothing = response_bytes({})
    assert response_bytes({"SEED": np.zeros(1, np.int64), "VIDEO": bytes_of(b"12345")}) == nothing + 8 + 4 + 5
