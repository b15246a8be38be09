"""Outputs asked for by name, against the one that OUTPUT makes."""

import pytest

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request.asked_outputs import RESULTS, check_asked
from stepvideo_serve.request.fields import OUTPUTS


@pytest.mark.parametrize("output", OUTPUTS)
def test_who_asks_for_what_there_will_be_has_it(output: str) -> None:
    assert set(RESULTS) == set(OUTPUTS)
    for names in ([RESULTS[output]], [*RESULTS.values(), "SEED", "STEP"], ["SEED", "REPORT"], []):
        check_asked(names, output)


def test_who_asks_for_another_result_only_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"must have VIDEO, because OUTPUT is mp4, got FRAMES: .* OUTPUT frames"):
        check_asked(["SEED", "FRAMES"], "mp4")
    with pytest.raises(InvalidRequest, match=r"must have LATENTS, because OUTPUT is latents, got VIDEO, FRAMES: "):
        check_asked(["FRAMES", "VIDEO"], "latents")
