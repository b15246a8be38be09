"""Price files: what is written is read again, damage is refused in one sentence, and other parameters have no price."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from stepvideo_serve.errors import ConfigError
from stepvideo_serve.planning.prices import (
    Comparison,
    Estimate,
    Measures,
    Price,
    PriceBook,
    PriceFile,
    Served,
    Setting,
)
from stepvideo_serve.request.presets import Preset, shipped_presets

FAST = shipped_presets()["fast"]
SETTING = Setting(34, 64, 64, 50, 7.3, 13.0)
SERVED = Served("abc", "bf16", "ort", "tp2")
ONE = Estimate(1.0, 0.5, 1.5, 0.25, 2.0)
MEASURES = Measures(16, ONE, 1.0, ONE, ONE, ONE, ONE, 0.99, {"direction": 1.0})


def make_file() -> PriceFile:
    prices = [
        Price("fast", FAST.parameters(), SETTING, MEASURES),
        Price("other", Preset("exact", guidance_from=0.1).parameters(), SETTING, replace(MEASURES, motion=None)),
    ]
    unseen = replace(MEASURES, psnr_db=None, motion=None, motion_rank=None, shares={})
    return PriceFile.of(SERVED, prices, [Comparison("20 steps", SETTING, unseen)])


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "prices.json"
    make_file().save(path)
    return path


@pytest.fixture
def schema(root: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((root / "docs" / "price-file.schema.json").read_text(encoding="utf-8"))
    return loaded


def test_what_is_written_is_read(written: Path, schema: dict[str, Any]) -> None:
    assert PriceFile.load(written) == replace(make_file(), date=PriceFile.load(written).date)
    assert [path.name for path in written.parent.iterdir()] == ["prices.json"]
    jsonschema.validate(json.loads(written.read_text(encoding="utf-8")), schema)


def test_a_price_is_for_exactly_its_parameters(written: Path) -> None:
    book = PriceBook.load([written])
    found = book.find("abc", "bf16", FAST, SETTING)
    assert found is not None
    assert found.preset == "fast"
    rounded = replace(SETTING, cfg_scale=7.300000190734863)  # 7.3 in fp32
    assert book.find("abc", "bf16", FAST, rounded) == found
    assert book.find("abcd", "bf16", FAST, SETTING) is None
    assert book.find("abc", "fp32", FAST, SETTING) is None
    assert book.find("abc", "bf16", replace(FAST, longest_streak=7), SETTING) is None
    for change in ({"steps": 49}, {"cfg_scale": 7.31}, {"time_shift": 7.0}, {"num_frames": 17}, {"width": 80}):
        assert book.find("abc", "bf16", FAST, replace(SETTING, **change)) is None


def test_the_newest_price_counts() -> None:
    old = replace(make_file(), date="2026-01-02T00:00:00+00:00")
    new = replace(old, date="2026-01-02T01:00:00+00:00", prices=tuple(replace(p, preset="new") for p in old.prices))
    for files in ([old, new], [new, old]):
        found = PriceBook(files).find("abc", "bf16", FAST, SETTING)
        assert found is not None
        assert found.preset == "new"
    assert PriceBook([]).find("abc", "bf16", FAST, SETTING) is None


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], str]:
    def text(value: dict[str, Any]) -> str:
        change(value)
        return json.dumps(value)

    return text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda _: "", "it is no JSON", id="empty"),
        pytest.param(lambda value: json.dumps(value)[:-20], "it is no JSON", id="cut off"),
        pytest.param(lambda _: "[" * 100_000, "it is no JSON", id="deep"),
        pytest.param(lambda _: "[1]", "format and version must be", id="no object"),
        pytest.param(edited(lambda v: v.update(version=2)), r"format and version .*, 2\)", id="version"),
        pytest.param(edited(lambda v: v.update(format="prices")), "format and version", id="format"),
        pytest.param(edited(lambda v: v.pop("served")), "must have the keys .*'served' is amiss", id="missing"),
        pytest.param(edited(lambda v: v["served"].update(gpu="x")), "served must have .*'gpu' is amiss", id="unknown"),
        pytest.param(edited(lambda v: v.update(prices={})), "prices must be a list, got {}", id="no list"),
        pytest.param(
            edited(lambda v: v["prices"][0]["measures"].update(clips=1.5)),
            "prices > 0 > measures > clips must be an integer, got 1.5",
            id="float",
        ),
        pytest.param(
            edited(lambda v: v["prices"][1]["measures"]["latent_error"].update(mean="0")),
            "prices > 1 > measures > latent_error > mean must be a finite number, got '0'",
            id="text",
        ),
        pytest.param(
            edited(lambda v: v["comparisons"][0]["setting"].update(cfg_scale=10**400)),
            "comparisons > 0 > setting > cfg_scale must be a finite number",
            id="huge",
        ),
        pytest.param(
            edited(lambda v: v["prices"][0]["measures"].update(guided_share=float("nan"))), "NaN is no number", id="nan"
        ),
        pytest.param(
            edited(lambda v: v["prices"][0]["measures"]["shares"].update(direction=None)),
            "shares > direction must be a finite number, got None",
            id="share",
        ),
        pytest.param(
            edited(lambda v: v["prices"][0]["parameters"].update(tolerance=-1)),
            "tolerance must be .* above 0",
            id="tol",
        ),
        pytest.param(
            edited(lambda v: v["prices"][0]["parameters"].update(speed=2)),
            "unexpected keyword argument",
            id="parameter",
        ),
        pytest.param(edited(lambda v: v.update(date="yesterday")), "isoformat", id="date"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(
    written: Path, damage: Callable[[dict[str, Any]], str], message: str
) -> None:
    written.write_text(damage(json.loads(written.read_text(encoding="utf-8"))), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as refusal:
        PriceFile.load(written)
    text = str(refusal.value)
    assert text.startswith(f"{written} must be a price file of version 1, ")
    assert text.endswith(": measure again with make prices.")
    assert len(re.findall(r"\.(?:\s|$)", text)) == 1
    assert len(text) < 600


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[pricing\] files must name price files, .*none.json: No such file"):
        PriceBook.load([tmp_path / "none.json"])


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(version=2),
        lambda v: v.pop("date"),
        lambda v: v["served"].update(gpu="x"),
        lambda v: v["prices"][0]["measures"].update(clips="1"),
        lambda v: v["prices"][0]["measures"]["evaluations"].pop("low"),
        lambda v: v["prices"][0]["parameters"].update(rule="quick"),
        lambda v: v["comparisons"][0].update(parameters={}),
    ],
)
def test_schema_and_reader_refuse_the_same(written: Path, schema: dict[str, Any], change: Any) -> None:
    value = json.loads(written.read_text(encoding="utf-8"))
    change(value)
    written.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, schema)
    with pytest.raises(ConfigError):
        PriceFile.load(written)
