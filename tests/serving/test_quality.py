"""QUALITY through a running server: what is refused, what the caller sees, and that a mask repeats a run."""

from typing import Any

import numpy as np
import pytest

from stepvideo_client import Client, Result, StepEvent
from stepvideo_serve.config import ServeConfig
from tests.serving.calls import Refused, Server, Values, report_of

STEPS = 20


@pytest.fixture(scope="module")
def twenty(small: Values) -> Values:
    return {**small, "STEPS": np.array([STEPS], np.int32), "CFG_SCALE": np.array([4.0], np.float32)}


def test_what_is_refused(server: Server, twenty: Values) -> None:
    bad = {
        b"quick": "QUALITY must be one of exact, rough, or mask: and a digit per step, got 'quick'",
        b"Quick": "QUALITY must be a preset's name",
        b"mask:11": f"The mask must have one digit for each of the {STEPS} steps, got 2",
        b"mask:" + b"1" * (STEPS - 1) + b"0": "The mask must begin and end with 1, got 1 and 0",
        b"mask:" + b"0" + b"1" * (STEPS - 1): "The mask must begin and end with 1, got 0 and 1",
    }
    for quality, words in bad.items():
        for send in (server.stream, server.grpc, server.http):
            with pytest.raises(Refused) as refusal:
                send({**twenty, "QUALITY": quality})
            assert f"INVALID_ARGUMENT: {words}" in refusal.value.text
        asked = {name: twenty[name] for name in ("STEPS", "CFG_SCALE")}
        with pytest.raises(Refused, match="INVALID_ARGUMENT: "):
            server.grpc({**asked, "QUALITY": quality}, "ti2v_quote")


def test_a_preset_is_counted_reported_and_repeated_by_its_mask(
    server: Server, config: ServeConfig, twenty: Values
) -> None:
    exact = server.stream(twenty)
    answer = server.stream({**twenty, "QUALITY": b"rough"})
    report = report_of(answer.result)["quality"]
    mask = report.pop("mask")
    counts = [int(step["EVALUATIONS"][0]) for step in answer.progress if step["STEP"][0] > 0]
    assert counts == list(np.cumsum([digit == "1" for digit in mask]))
    assert report == {
        "preset": "rough",
        **config.presets["rough"].parameters(),
        "evaluations": mask.count("1"),
        "guided_share": 1.0,
    }
    assert len(mask) == STEPS
    assert "0" in mask
    assert report_of(exact.result)["quality"] == {
        "preset": "exact",
        **config.presets["exact"].parameters(),
        "mask": "1" * STEPS,
        "evaluations": STEPS,
        "guided_share": 1.0,
    }
    again = server.grpc({**twenty, "QUALITY": b"mask:" + mask.encode()})
    np.testing.assert_array_equal(again["LATENTS"], answer.result["LATENTS"])
    assert report_of(again)["quality"]["preset"] == "mask:"
    assert not np.array_equal(answer.result["LATENTS"], exact.result["LATENTS"])


def test_below_ten_steps_everything_is_evaluated(server: Server, small: Values) -> None:
    plain, rough = (server.grpc({**small, **quality}) for quality in ({}, {"QUALITY": b"rough"}))
    np.testing.assert_array_equal(plain["LATENTS"], rough["LATENTS"])
    assert report_of(rough)["quality"]["mask"] == "11"


def test_the_client_sends_it_and_shows_the_count(server: Server, picture: bytes) -> None:
    options: dict[str, Any] = {"num_frames": 17, "height": 64, "width": 96, "steps": STEPS, "cfg_scale": 4.0}
    with Client(server.grpc_url) as client:
        *events, result = client.generate(picture, "a cat", quality="rough", output="latents", seed=7, **options)
    assert isinstance(result, Result)
    counts = [event.evaluations for event in events if isinstance(event, StepEvent) and event.step > 0]
    assert counts[-1] == result.report["quality"]["evaluations"] < STEPS
