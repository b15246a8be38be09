"""`make prices` on a tiny checkpoint: estimate, table, price file, interruption; and the figures that it computes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perf.prices.__main__ import main
from perf.prices.journal import Journal
from perf.prices.measure import Clip, psnr_db
from perf.prices.summary import estimate, measures, rank_correlation, table
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.errors import ConfigError
from stepvideo_serve.planning.prices import PriceBook, PriceFile, Setting
from stepvideo_serve.request.presets import Preset
from toyworld.samples import first_image, png
from toyworld.world import Scene

SCENE = Scene("circle", "red", "right", False, 0, 5.0, 32.0, 32.0)
LOOSE = Preset("adaptive", tolerance=5.0, dense_start=0.01, dense_end=0.9, longest_streak=3)
MASK = "1" + "10" * 5 + "1"
CONFIG = f"""[model]
dir = "model"
engines_dir = "model"
[presets.loose]
rule = "adaptive"
tolerance = 5.0
dense_start = 0.01
dense_end = 0.9
longest_streak = 3
[presets.masked]
rule = "fixed"
mask = "{MASK}"
cfg_scale = 4
time_shift = 7
[presets.elsewhere]
rule = "fixed"
mask = "{MASK}"
cfg_scale = 9
time_shift = 7
"""


@dataclass
class Said:
    code: int
    out: str
    err: str


Prices = Callable[..., Said]


@pytest.fixture
def arguments(tmp_path: Path, mini_checkpoint: Path) -> list[str]:
    """For two pairs of 17 frames."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png(first_image(SCENE)))
        (tmp_path / f"{name}.txt").write_text(f"红色圆形向右移动 {name}", encoding="utf-8")
    (tmp_path / "serve.toml").write_text(CONFIG, encoding="utf-8")
    found = ["--model-dir", mini_checkpoint, "--requests", tmp_path, "--config", tmp_path / "serve.toml"]
    found += ["--num-frames", 17, "--height", 32, "--width", 48, "--steps", 12, "--settings", "4:7"]
    return [str(one) for one in (*found, "--threads", 1, "--out", tmp_path / "out" / "prices.json")]


@pytest.fixture
def prices(
    arguments: list[str], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Prices:
    """Runs the tool in this process."""
    monkeypatch.chdir(root)

    def run(*extra: str) -> Said:
        monkeypatch.setattr("sys.argv", ["prices", *arguments, *extra])
        code = main()
        printed = capsys.readouterr()
        return Said(code, printed.out, printed.err)

    return run


def test_prices_of_any_checkpoint_and_requests(prices: Prices, tmp_path: Path, mini_checkpoint: Path) -> None:
    done = prices("--fewer-steps", "5")
    assert done.code == 0, done.err
    said = done.err.splitlines()
    first = next(i for i, line in enumerate(said) if "2 requests to measure: at most" in line)
    assert first < next(i for i, line in enumerate(said) if "4:7 a: exact" in line)
    assert "elsewhere is left out: This fixed preset holds for CFG_SCALE = 9" in done.err
    assert "2 of 2 requests in" in done.err
    file = PriceFile.load(tmp_path / "out" / "prices.json")
    assert [price.preset for price in file.prices] == ["loose", "masked"]
    assert [other.name for other in file.comparisons] == ["5 steps"]
    assert all(f"| {name} |" in done.out for name in ("exact", "loose", "masked", "5 steps"))
    loose, masked = (price.measures for price in file.prices)
    assert (loose.clips, loose.motion, loose.guided_share, loose.shares) == (2, None, 1.0, {})
    assert loose.evaluations.most < 12
    assert masked.evaluations.mean == MASK.count("1")
    assert 0 < masked.latent_error.mean < 1
    assert loose.psnr_db is not None
    identity, setting = Checkpoint(mini_checkpoint).identity, Setting(17, 32, 48, 12, 4.0, 7.0)
    assert PriceBook([file]).find(identity, "fp32", LOOSE, setting) == file.prices[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["prices.json"]


def test_an_interrupted_run_goes_on(prices: Prices, arguments: list[str], tmp_path: Path, root: Path) -> None:
    """As if the process had been killed while it wrote the second request."""
    extra = ("--presets", "exact", "masked", "--fewer-steps")
    command = [sys.executable, "-m", "perf.prices", *arguments, *extra]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "1 of 2 requests" in line:
                process.kill()
                break
    assert process.returncode != 0
    journal = tmp_path / "out" / "prices.journal"
    kept = journal.read_text(encoding="utf-8").splitlines()
    assert len(kept) == 2
    journal.write_text("\n".join(kept) + '\n{"case": "4:7 b", "cl', encoding="utf-8")
    again = prices(*extra)
    assert again.code == 0, again.err
    assert "1 requests to measure" in again.err
    assert "4:7 a: exact" not in again.err
    assert PriceFile.load(tmp_path / "out" / "prices.json").prices[0].measures.clips == 2
    assert not journal.exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--presets", "loose", "slow"], "--presets must be among exact, loose, masked, elsewhere .*, got 'slow'"),
        (["--requests", "nowhere"], "--requests must be a folder of image and text pairs"),
        (["--backend", "ort"], "--engines must name the folder of graphs"),
        (["--bf16", "--precision", "bf16"], "--bf16 compares torch's precisions"),
        (["--first", "5"], "--first must be below the 2 pairs"),
        (["--model-dir", "nowhere"], "model directory nowhere must exist"),
        (["--config", "nowhere"], "configuration must be a TOML file, nowhere"),
    ],
)
def test_wrong_options_are_one_sentence(prices: Prices, wrong: list[str], message: str) -> None:
    done = prices(*wrong)
    assert done.code == 2
    [sentence] = [line for line in done.err.splitlines() if line.startswith("perf.prices: ")]
    assert re.search(message, sentence), sentence


def test_only_the_toy_world_has_requests_of_its_own(
    mini_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["prices", "--model-dir", str(mini_checkpoint)])
    assert main() == 2
    assert "--requests must name a folder of images and texts" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--settings", "9"], ["--settings", "nan:7"], ["--clips", "0"], ["--first", "-1"]])
def test_numbers_out_of_range_are_refused(prices: Prices, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        prices(*wrong)
    assert refusal.value.code == 2


def clip(variant: str = "x", **changes: Any) -> Clip:
    base = Clip(variant, "1011", 3, 1.0, 2.0, 0.1, 40.0, {"speed": 1.0, "direction": 1.0})
    return replace(base, **changes)


def test_figures_by_hand() -> None:
    exact = [clip(seconds=4.0, shown={"speed": speed, "direction": 1.0}) for speed in (1.0, 2.0, 3.0)]
    drawn = [
        clip(latent_error=0.1, shown={"speed": 1.1, "direction": 1.0}),
        clip(latent_error=0.3, shown={"speed": 1.8, "direction": 0.0}, psnr_db=30.0),
        clip(latent_error=0.2, shown={"speed": 3.0, "direction": 0.5}, evaluations=4),
    ]
    row = measures(drawn, exact)
    assert row.clips == 3
    assert row.motion is not None
    assert row.motion.mean == pytest.approx((1.1 + 0.9 + 1.0) / 3)
    assert (row.motion.least, row.motion.most) == pytest.approx((0.9, 1.1))
    assert row.motion_rank == pytest.approx(1.0)
    assert row.shares == {"direction": pytest.approx(0.5)}
    assert row.seconds_over_exact.mean == pytest.approx(0.5)
    assert row.latent_error.mean == pytest.approx(0.2)
    assert row.latent_error.low <= 0.2 <= row.latent_error.high
    assert (row.evaluations.least, row.evaluations.most) == (3, 4)
    assert row.psnr_db is not None
    assert row.psnr_db.least == 30.0
    assert measures([clip(psnr_db=None, shown={})], [clip()]).psnr_db is None
    assert "| x | 3.3 (3 .. 4) | 2.0e-01 / 3.0e-01 | 36.7 / 30.0 | 0.50 | 1.0000" in table([("x", row)])


def test_the_bootstrap_interval_shrinks_with_the_clips() -> None:
    values = np.random.default_rng(5).normal(1.0, 0.1, 400).tolist()
    few, many = estimate(values[:8]), estimate(values)
    assert many.high - many.low < (few.high - few.low) / 3
    assert many.high - many.low == pytest.approx(4 * 0.1 / 20, rel=0.2)
    assert estimate([2.0]) == estimate([2.0, 2.0])


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert rank_correlation([1, 1], [1, 2]) is None


def test_psnr() -> None:
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr_db(frames, frames) == 99.0
    assert psnr_db(frames, np.full_like(frames, 255)) == pytest.approx(0.0)
    assert psnr_db(frames, np.full_like(frames, 1)) == pytest.approx(48.13, abs=0.01)


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.journal"
    Journal(path, {"served": (1, 2)}).add("case", [clip()])
    assert Journal(path, {"served": (1, 2)}).done == {"case": [clip()]}
    with pytest.raises(ConfigError, match="same options, it holds another: remove it"):
        Journal(path, {"served": (1, 3)})
    lines = path.read_text(encoding="utf-8").splitlines()
    for damage in (
        ["no json", *lines[1:]],
        [lines[0], '{"case": "x"}'],
        [lines[0], json.dumps({"case": 1, "clips": [1]})],
    ):
        path.write_text("\n".join(damage) + "\n", encoding="utf-8")
        with pytest.raises(ConfigError, match="it is damaged: remove it"):
            Journal(path, {"served": (1, 2)})
