"""Prices at work: what is warned of, what is refused, and that a price for something else is none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stepvideo_serve.config import ModelConfig, PricingConfig, ServeConfig
from stepvideo_serve.errors import ConfigError, InvalidRequest
from stepvideo_serve.planning.prices import Estimate, Measures, Price, PriceBook, PriceFile, Served, Setting
from stepvideo_serve.planning.pricing import Pricing
from stepvideo_serve.request import GenerationRequest, RequestLimits, check_quality, parse_request
from stepvideo_serve.request.presets import shipped_presets
from tests.mini import bytes_of

PRESETS = shipped_presets()
ONE = Estimate(1.0, 1.0, 1.0, 1.0, 1.0)
MEASURES = Measures(16, ONE, 1.0, ONE, None, ONE, None, None, {})
SETTING = Setting(34, 64, 96, 50, 4.1, 7.0)
FILE = PriceFile.of(
    Served("weights", "fp32", "ort", "single"), [Price("slow", PRESETS["fast"].parameters(), SETTING, MEASURES)], []
)


def request_of(quality: bytes, steps: int = 50, height: int = 64) -> GenerationRequest:
    numbers = {"NUM_FRAMES": 34, "HEIGHT": height, "WIDTH": 96, "STEPS": steps}
    inputs = {name: np.array([value], np.int32) for name, value in numbers.items()}
    inputs["CFG_SCALE"] = np.array([4.1], np.float32)
    texts = {"PROMPT": bytes_of(b""), "IMAGE": bytes_of(b"x"), "QUALITY": bytes_of(quality)}
    return parse_request({**inputs, **texts}, RequestLimits(), 4)


def warning(pricing: Pricing, request: GenerationRequest) -> str | None:
    return pricing.warning(request, check_quality(request, PRESETS))


@pytest.mark.parametrize(
    "request_",
    [request_of(b"exact"), request_of(b"fast"), request_of(b"balanced", 9), request_of(b"mask:" + b"1" * 50)],
    ids=["exact", "priced under another name", "every step is evaluated", "a full mask"],
)
def test_what_is_priced_or_costs_nothing_passes(request_: GenerationRequest) -> None:
    assert warning(Pricing(PriceBook([FILE]), "weights", "fp32", require=True), request_) is None


UNPRICED = {
    "another preset": (request_of(b"balanced"), "weights", "fp32"),
    "a mask": (request_of(b"mask:" + b"1" * 48 + b"01"), "weights", "fp32"),
    "another size": (request_of(b"fast", height=80), "weights", "fp32"),
    "other steps": (request_of(b"fast", steps=40), "weights", "fp32"),
    "another checkpoint": (request_of(b"fast"), "others", "fp32"),
    "another precision": (request_of(b"fast"), "weights", "bf16"),
}


@pytest.mark.parametrize(("request_", "checkpoint", "precision"), UNPRICED.values(), ids=UNPRICED.keys())
def test_a_price_for_something_else_is_none(request_: GenerationRequest, checkpoint: str, precision: str) -> None:
    book = PriceBook([FILE])
    sentence = warning(Pricing(book, checkpoint, precision, require=False), request_)
    assert sentence is not None
    assert "has no price on this server for 34 frames of" in sentence
    with pytest.raises(InvalidRequest, match=r"^QUALITY .* has no price .*, which the server requires: ask for"):
        warning(Pricing(book, checkpoint, precision, require=True), request_)


def test_files_are_read_at_the_start(tmp_path: Path) -> None:
    config = ServeConfig(ModelConfig(tmp_path, tmp_path))
    assert warning(Pricing.of(config), request_of(b"fast")) is not None, "without files nothing is priced"
    damaged = tmp_path / "prices.json"
    damaged.write_text("{")
    with pytest.raises(ConfigError, match="must be a price file of version 1"):
        Pricing.of(replace(config, pricing=PricingConfig((damaged,))))
