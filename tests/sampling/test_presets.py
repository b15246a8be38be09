"""Presets: what contradicts itself is refused in one sentence, in the object and in serve.toml."""

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepvideo_serve.config import PricingConfig, ServeConfig
from stepvideo_serve.errors import ConfigError, InvalidRequest
from stepvideo_serve.request.presets import (
    EXACT_PRESET,
    OF_RULE,
    Preset,
    mask_fault,
    preset_name,
    preset_of,
    shipped_presets,
)

MODEL = '[model]\ndir = "weights"\nengines_dir = "engines"\n'
ADAPTIVE: dict[str, Any] = {"tolerance": 0.1, "dense_start": 0.02, "dense_end": 0.9, "longest_streak": 5}
MASK = "11" + "0" * 7 + "1"
FIXED: dict[str, Any] = {"mask": MASK, "cfg_scale": 9.0, "time_shift": 13.0}


def loaded(tmp_path: Path, text: str) -> ServeConfig:
    path = tmp_path / "serve.toml"
    path.write_text(MODEL + text, encoding="utf-8")
    return ServeConfig.load(path)


@pytest.mark.parametrize(
    ("rule", "change", "message"),
    [
        ("adaptive", {"tolerance": math.nan}, "tolerance must be a finite number above 0, got nan"),
        ("adaptive", {"tolerance": -0.1}, "tolerance .* above 0, got -0.1"),
        ("adaptive", {"tolerance": 0.0}, "tolerance .* above 0, got 0.0"),
        ("adaptive", {"tolerance": math.inf}, "tolerance .* finite"),
        ("adaptive", {"tolerance": None}, 'rule = "adaptive" needs tolerance, got none'),
        ("adaptive", {"dense_start": math.nan}, "dense_start must be a time from 0 to 1, got nan"),
        ("adaptive", {"dense_start": -0.1}, "dense_start must be a time"),
        ("adaptive", {"dense_end": 1.5}, "dense_end must be a time from 0 to 1, got 1.5"),
        ("adaptive", {"dense_start": 0.9}, "dense_start must be below dense_end"),
        ("adaptive", {"longest_streak": 0}, "longest_streak must be at least 1, got 0"),
        ("adaptive", {"mask": MASK}, 'mask contradicts rule = "adaptive"'),
        ("adaptive", {"guidance_from": 0.5, "guidance_to": 0.5}, "guidance_from must be below guidance_to"),
        ("adaptive", {"guidance_from": math.nan}, "guidance_from must be below"),
        ("adaptive", {"guidance_to": 1.1}, "both times from 0 to 1"),
        ("exact", {"tolerance": 0.1}, 'tolerance contradicts rule = "exact"'),
        ("fixed", {"longest_streak": 2}, 'longest_streak contradicts rule = "fixed"'),
        ("fixed", {"mask": None}, 'rule = "fixed" needs mask'),
        ("fixed", {"mask": "0" + MASK[1:]}, "mask must begin and end with 1, got 0 and 1"),
        ("fixed", {"mask": MASK[:-1] + "0"}, "mask must begin and end with 1, got 1 and 0"),
        ("fixed", {"mask": "1121111111"}, "0 and 1 only, got '2'"),
        ("fixed", {"mask": ""}, "got 0"),
        ("fixed", {"mask": "101"}, "at least 10 STEPS, got 3"),
        ("fixed", {"cfg_scale": math.nan}, "cfg_scale must be a finite number above 0"),
        ("fixed", {"time_shift": -1.0}, "time_shift must be a finite number above 0"),
        ("sometimes", {}, "rule must be one of exact, adaptive, fixed, got 'sometimes'"),
    ],
)
def test_contradictions_are_one_sentence(rule: Any, change: dict[str, Any], message: str) -> None:
    values = {"exact": {}, "adaptive": ADAPTIVE, "fixed": FIXED}.get(rule, {})
    with pytest.raises(ConfigError, match=message) as refusal:
        Preset(rule, **{**values, **change})
    assert len(re.findall(r"[.!?](?:\s|$)", str(refusal.value))) == 1


def test_masks_are_bounded() -> None:
    assert mask_fault("1" * 50, 50) is None
    assert mask_fault("1" * 8, 8) is None
    for mask, steps in (("1" * 49, 50), ("1" * 51, 50), ("1" * 100_000, 100_000), ("", 0)):
        fault = mask_fault(mask, steps)
        assert fault is not None
        assert len(fault) < 200


def test_parameters_are_what_is_set() -> None:
    always = {"guidance_from": 0.0, "guidance_to": 1.0}
    assert EXACT_PRESET.parameters() == {"rule": "exact", **always}
    assert Preset("adaptive", **ADAPTIVE).parameters() == {"rule": "adaptive", **ADAPTIVE, **always}
    assert Preset("fixed", **FIXED).parameters() == {"rule": "fixed", **FIXED, **always}


def test_without_presets_there_are_the_shipped_ones(tmp_path: Path) -> None:
    config = loaded(tmp_path, "")
    assert list(config.presets) == ["exact", "balanced", "fast"]
    assert config.presets == shipped_presets()
    assert config.pricing == PricingConfig((), False)


def test_own_presets_take_their_place(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        '[presets.mine-2]\nrule = "adaptive"\ntolerance = 1\ndense_start = 0\ndense_end = 1\nlongest_streak = 3\n'
        f'[presets.masked]\nrule = "fixed"\nmask = "{MASK}"\ncfg_scale = 9\ntime_shift = 13\nguidance_from = 0.1\n'
        '[pricing]\nfiles = ["a.json", "/b.json"]\nrequire = true\n',
    )
    assert list(config.presets) == ["exact", "mine-2", "masked"]
    mine = config.presets["mine-2"]
    assert (mine.tolerance, mine.dense_start, mine.dense_end, mine.longest_streak) == (1.0, 0.0, 1.0, 3)
    assert config.presets["masked"] == Preset("fixed", **FIXED, guidance_from=0.1)
    assert config.pricing == PricingConfig((tmp_path / "a.json", Path("/b.json")), True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[presets.mine]\nrule = "adaptive"\ntolerance = nan', r"\[presets.mine\] tolerance .* finite number, got nan"),
        (
            '[presets.mine]\nrule = "exact"\ntolerance = 0.1',
            r'\[presets.mine\] .*: tolerance contradicts rule = "exact"',
        ),
        ("[presets.mine]\ntolerance = 0.1", r"\[presets.mine\] .* needs rule"),
        ('[presets.mine]\nrule = "exact"\nspeed = 2', r"\[presets.mine\] .* may have .*, got 'speed'"),
        (
            '[presets.mine]\nrule = "quick"',
            r"\[presets.mine\] rule .* one of 'exact', 'adaptive', 'fixed', got 'quick'",
        ),
        ('[presets.mine]\nrule = "adaptive"\nlongest_streak = 2.5', "longest_streak .* an integer, got 2.5"),
        ('[presets."Mine too"]\nrule = "exact"', r"\[presets\] .* name must be .*, got 'Mine too'"),
        ('[presets.exact]\nrule = "exact"\nguidance_to = 0.5', r"\[presets.exact\] must be rule = \"exact\""),
        ("presets = 3", r"presets .* must hold tables, got 3"),
        ("[presets]\nmine = 3", r"presets.mine .* must be a table, got 3"),
        ('[pricing]\nfiles = "a.json"', r"\[pricing\] files .* a list \[a path, ...\], got 'a.json'"),
        ("[pricing]\nrequire = 1", r"\[pricing\] require .* true or false, got 1"),
    ],
)
def test_refused_with_key_and_file(tmp_path: Path, text: str, message: str) -> None:
    # a bare key must stand above the first table
    (tmp_path / "serve.toml").write_text(f"{text}\n{MODEL}" if text[0] != "[" else MODEL + text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as refusal:
        ServeConfig.load(tmp_path / "serve.toml")
    assert str(refusal.value).count(str(tmp_path)) == 1


def test_the_committed_file_shows_every_key_of_the_shipped_presets(root: Path) -> None:
    table = tomllib.loads((root / "serve.toml").read_text(encoding="utf-8"))["presets"]
    keys = {"rule", *OF_RULE["adaptive"], "guidance_from", "guidance_to"}
    assert {name: set(values) for name, values in table.items()} == {"balanced": keys, "fast": keys}


def test_the_document_gives_the_shipped_parameters(root: Path) -> None:
    text = (root / "docs" / "quality.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (balanced|fast) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", text, re.MULTILINE)
    assert dict.fromkeys(row[0] for row in rows).keys() == {"balanced", "fast"}
    for name, *numbers in rows:
        preset = shipped_presets()[name]
        expected = (preset.tolerance, preset.dense_start, preset.dense_end, preset.longest_streak)
        assert tuple(map(float, numbers)) == expected


RECORDED = "1111110011"
PRESETS = {**shipped_presets(), "recorded": Preset("fixed", mask=RECORDED, cfg_scale=4.1, time_shift=7.0)}


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        ("exact", EXACT_PRESET),
        ("fast", PRESETS["fast"]),
        ("recorded", PRESETS["recorded"]),
        (f"mask:{RECORDED}", PRESETS["recorded"]),
    ],
)
def test_what_a_quality_means(quality: str, expected: Preset) -> None:
    scale = float(np.float32(4.1)) if quality == "recorded" else 4.1
    assert preset_of(quality, PRESETS, 10, scale, 7.0) == expected
    assert preset_name(quality) == quality.partition(RECORDED)[0]


@pytest.mark.parametrize(
    ("quality", "steps", "scale", "words"),
    [
        (
            "quick",
            10,
            4.1,
            "must be one of exact, balanced, fast, recorded, or mask: and a digit .*, got 'quick'",
        ),
        ("recorded", 11, 4.1, "one digit for each of the 11 steps, got 10"),
        ("recorded", 10, 4.0, "holds for CFG_SCALE = 4.1 and TIME_SHIFT = 7 only, got 4 and 7"),
        (f"mask:{RECORDED}", 11, 4.1, "one digit for each of the 11 steps, got 10"),
        ("mask:0111111111", 10, 4.1, "must begin and end with 1, got 0 and 1"),
        ("mask:1111111110", 10, 4.1, "must begin and end with 1, got 1 and 0"),
        ("mask:101", 3, 4.1, "needs at least 10 STEPS, got 3"),
    ],
)
def test_a_quality_that_means_nothing(quality: str, steps: int, scale: float, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refusal:
        preset_of(quality, PRESETS, steps, scale, 7.0)
    assert str(refusal.value).count(". ") == 0
