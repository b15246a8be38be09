"""`stepvideo compare` over two folders, and the price file that a server reads."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from stepvideo_client.evaluation.statistics import estimate
from stepvideo_serve.planning.prices import PriceBook, PriceFile, Setting
from stepvideo_serve.request.presets import shipped_presets
from tests.evaluation.reading import Tags, one_sentence, run
from tests.evaluation.synthetic import BALANCED, EXACT, Frame, moving, plain, write_clip, write_mp4

CLIPS = 3
LENGTH = 6
SPEED, ERROR = 2, 0.01


def frames(index: int) -> list[Frame]:
    return moving([(SPEED, 0)] * (LENGTH - 1), height=64, width=96 + 2 * index)


def latents(index: int, error: float = 0.0) -> NDArray[np.float32]:
    """With exactly this relative error against the one without."""
    values = np.random.default_rng(index).normal(size=(6, 8, 4, 4)).astype(np.float32)
    return (values * (1 + error)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a, exact, and b, balanced: latents off by 1 %, every second clip a level brighter, and seconds as the
    evaluations say. For reading only."""
    folder = tmp_path_factory.mktemp("compare")
    for index in range(CLIPS):
        write_clip(folder / "a", f"c{index}", frames(index), latents(index))
        changed = [np.asarray(np.minimum(frame, 254) + (index % 2), np.uint8) for frame in frames(index)]
        write_clip(folder / "b", f"c{index}", changed, latents(index, ERROR), quality=BALANCED)
    return folder


@pytest.fixture
def both(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of them."""
    for side in ("a", "b"):
        shutil.copytree(made / side, tmp_path / side)
    return tmp_path / "a", tmp_path / "b"


def result(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    return values


def test_a_folder_with_itself_is_equal(both: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    limits = ["--min-psnr", "99", "--min-ssim", "1", "--max-latent-error", "0", "--max-motion-change", "0"]
    assert run("compare", both[0], both[0], "--out", out, *limits, "--max-time-ratio", "1", "--each") == 0
    found = result(out)
    assert (found["clips"], found["equal"]) == (CLIPS, CLIPS)
    for name, value in {"psnr_db": 99, "ssim": 1, "latent_error": 0, "motion_ratio": 1, "seconds_ratio": 1}.items():
        assert found["summary"][name] == dict.fromkeys(("mean", "low", "high", "least", "most"), pytest.approx(value))


def test_the_figures(both: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("compare", *both, "--out", out) == 0
    found = result(out)
    assert found["summary"]["latent_error"]["mean"] == pytest.approx(ERROR, rel=1e-4)
    assert found["summary"]["seconds_ratio"]["mean"] == pytest.approx(0.4)
    assert found["summary"]["evaluations_ratio"]["mean"] == pytest.approx(0.4)
    assert found["summary"]["motion_ratio"]["mean"] == pytest.approx(1, abs=0.01)
    by_name = {pair["id"]: pair for pair in found["pairs"]}
    assert by_name["c1"]["measures"]["psnr_db"] < by_name["c0"]["measures"]["psnr_db"]
    assert by_name["c1"]["differs"]["quality"] == ["exact", "balanced"]
    assert found["pairs"][0]["id"] == "c1", "the largest difference comes first"
    values = [pair["measures"]["psnr_db"] for pair in found["pairs"]]
    shuffled = estimate([by_name[f"c{index}"]["measures"]["psnr_db"] for index in range(CLIPS)])
    assert found["summary"]["psnr_db"]["mean"] == pytest.approx(np.mean(values)) == pytest.approx(shuffled.mean)
    again = tmp_path / "again"
    assert run("compare", *both, "--out", again) == 0
    assert result(again) == found


def test_psnr_of_known_levels(tmp_path: Path) -> None:
    """Plain frames survive the encoder: ten levels are ten levels, give or take one."""
    for side, level in (("a", 100), ("b", 110)):
        write_clip(tmp_path / side, "c", [plain(level)] * 3)
    assert run("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out") == 0
    found = result(tmp_path / "out")["pairs"][0]["measures"]
    assert found["psnr_db"] == pytest.approx(20 * math.log10(255 / 10), abs=1)
    assert found["motion_ratio"] is None, "nothing moves in A"
    assert not found["equal"]


def test_motion_that_is_lost_is_seen(tmp_path: Path) -> None:
    for side, speed in (("a", 12), ("b", 6)):  # the server's filter smooths slower motion
        write_clip(tmp_path / side, "c", moving([(speed, 0)] * 5))
    out = tmp_path / "out"
    assert run("compare", tmp_path / "a", tmp_path / "b", "--out", out, "--max-motion-change", "0.1") == 5
    assert result(out)["summary"]["motion_ratio"]["mean"] == pytest.approx(0.5, abs=0.05)
    assert result(out)["summary"]["latent_error"] is None


def test_the_page_has_both_videos_side_by_side(both: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("compare", *both, "--out", out, "--shown", "2", "--min-psnr", "90") == 5
    tags = Tags((out / "comparison.html").read_text(encoding="utf-8"))
    videos = [str(attributes["src"]) for tag, attributes in tags.found if tag == "video"]
    assert len(videos) == 4
    assert all((out / unquote(video)).is_file() for video in videos)
    assert {Path(video).parts[1] for video in videos} == {"a", "b"}
    others = [v for tag, at in tags.found for k, v in at.items() if k in ("src", "href") and tag != "video"]
    assert others
    assert all(str(value).startswith("data:") for value in others)
    assert "Not kept: PSNR" in tags.text
    assert "a prompt <of> c1" in tags.text


def test_names_that_urls_and_pages_must_escape(tmp_path: Path) -> None:
    name = 'a <b> & "c" 100% #1?'
    for side in ("a", "b"):
        write_clip(tmp_path / side, name, frames(0)[:3])
    assert run("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out") == 0
    tags = Tags((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))
    videos = [str(attributes["src"]) for tag, attributes in tags.found if tag == "video"]
    assert all(
        (tmp_path / "out" / unquote(video)).is_file() and "#" not in video and "?" not in video for video in videos
    )
    assert name in tags.text


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (["--max-latent-error", "0.011"], 0),
        (["--max-latent-error", "0.009"], 5),
        (["--min-psnr", "40"], 0),
        (["--min-psnr", "70", "--each"], 5),
        (["--min-ssim", "0.5", "--max-time-ratio", "0.5"], 0),
        (["--max-time-ratio", "0.3"], 5),
        (["--max-motion-change", "0.02", "--each"], 0),
    ],
)
def test_thresholds(both: tuple[Path, Path], tmp_path: Path, limits: list[str], code: int) -> None:
    assert run("compare", *both, "--out", tmp_path / "out", *limits) == code


def test_a_pair_that_cannot_be_compared_keeps_no_threshold(
    both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = both[1] / "videos" / "c2-0.mp4"
    video.write_bytes(video.read_bytes()[:1500])
    write_mp4(both[1] / "videos" / "c1-0.mp4", frames(1)[:4])
    assert run("compare", *both, "--out", tmp_path / "out") == 1
    assert "differ in their size or number of frames" in capsys.readouterr().err
    assert result(tmp_path / "out")["clips"] == CLIPS - 2
    assert run("compare", *both, "--out", tmp_path / "out", "--min-psnr", "10") == 5


def test_clips_of_one_side_only_are_told(
    both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(both[0], "more", frames(9))
    assert run("compare", *both, "--out", tmp_path / "out") == 0
    assert "only A has 1 clips, 'more-0' the first" in capsys.readouterr().err
    assert result(tmp_path / "out")["alone"] == {"a": ["more-0"], "b": []}


def test_results_that_a_server_had_kept_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clip(tmp_path / "a", "c", frames(0)[:2])
    write_clip(tmp_path / "b", "c", frames(0)[:2], change=lambda values: values["report"].update(repeated=True))
    assert run("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out") == 0
    assert "1 clips of B were not made anew" in capsys.readouterr().err


def test_folders_of_bare_videos(tmp_path: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        write_mp4(tmp_path / side / "x.mp4", frames(0))
    assert run("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out") == 0
    assert result(tmp_path / "out")["equal"] == 1


def prices(both: tuple[Path, Path], tmp_path: Path, *more: object) -> Path:
    path = tmp_path / "out" / "prices.json"  # in the folder that compare makes
    assert run("compare", *both, "--out", tmp_path / "out", "--price-file", path, *more) == 0
    return path


def test_the_price_file_is_what_a_server_reads(both: tuple[Path, Path], tmp_path: Path, root: Path) -> None:
    path = prices(both, tmp_path)
    schema = json.loads((root / "docs" / "price-file.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), schema)
    setting = Setting(LENGTH, 64, 96, 10, 4.0, 7.0)
    book = PriceBook([PriceFile.load(path)])
    price = book.find("abc", "fp32", shipped_presets()["balanced"], setting)
    assert price is not None
    assert price.preset == "balanced"
    assert price.measures.clips == 1, "each clip here has a width of its own"
    assert price.measures.latent_error.mean == pytest.approx(ERROR, rel=1e-4)
    assert price.measures.evaluations.mean == 4
    assert price.measures.seconds_over_exact.mean == pytest.approx(0.4)
    assert price.measures.motion is not None
    assert price.measures.motion.mean == pytest.approx(1, abs=0.01)
    assert book.find("abc", "fp32", shipped_presets()["fast"], setting) is None
    assert book.find("abc", "bf16", shipped_presets()["balanced"], setting) is None


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edits every line of results.jsonl."""
    path = folder / "results.jsonl"
    values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for one in values:
        change(one)
    path.write_text("".join(json.dumps(one) + "\n" for one in values), encoding="utf-8")


def same_size(values: dict[str, Any]) -> None:
    values["report"]["width"] = 96


def test_clips_of_one_setting_make_one_price(both: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in both:
        rewritten(folder, same_size)
    [price] = PriceFile.load(prices(both, tmp_path)).prices
    assert price.measures.clips == CLIPS
    assert price.measures.motion_rank == pytest.approx(1)


def test_a_fixed_preset_is_known_by_its_mask(both: tuple[Path, Path], tmp_path: Path) -> None:
    fixed = {"preset": "mask:", "rule": "fixed", "cfg_scale": 4.0, "time_shift": 7.0, "mask": "1100100001"}
    more = {"guidance_from": 0.0, "guidance_to": 1.0, "evaluations": 4, "guided_share": 1.0}
    rewritten(both[1], lambda values: values["report"].update(quality={**fixed, **more}))
    parameters = PriceFile.load(prices(both, tmp_path)).prices[0].parameters
    assert parameters["mask"] == "1100100001"


@pytest.mark.parametrize(
    ("quality", "served", "name"),
    [
        (EXACT, {"precision": "bf16"}, "bf16"),
        (BALANCED, {"layout": "tp2", "backend": "eager"}, "tp2, eager, balanced"),
        (EXACT, {"steps": 6}, "6 steps"),
    ],
)
def test_what_is_no_preset_becomes_a_comparison(
    both: tuple[Path, Path], tmp_path: Path, quality: dict[str, Any], served: dict[str, Any], name: str
) -> None:
    def edit(values: dict[str, Any]) -> None:
        report = values["report"]
        done = {key: report["quality"][key] for key in ("mask", "evaluations", "guided_share")}
        report.update({"quality": {**quality, **done}, **served})

    rewritten(both[1], edit)
    file = PriceFile.load(prices(both, tmp_path))
    assert not file.prices
    assert {one.name for one in file.comparisons} == {name}


def test_the_name_of_a_comparison_and_the_checkpoint_can_be_given(both: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in both:
        rewritten(folder, lambda values: values["report"].pop("checkpoint"))
    rewritten(both[1], lambda values: values["report"].update(precision="fp8"))
    file = PriceFile.load(prices(both, tmp_path, "--checkpoint", "xyz", "--name", "our fp8"))
    assert (file.served.checkpoint, file.served.precision) == ("xyz", "fp8")
    assert {one.name for one in file.comparisons} == {"our fp8"}


def in_both(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], None]:
    def edit(a: Path, b: Path) -> None:
        rewritten(a, change)
        rewritten(b, change)

    return edit


def only_b(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], None]:
    return lambda a, b: rewritten(b, change)  # noqa: ARG005


UNPRICED: dict[str, Callable[[Path, Path], None]] = {
    "needs exact as A": lambda a, b: rewritten(a, lambda values: values["report"]["quality"].update(BALANCED)),  # noqa: ARG005
    "needs the latents of both sides": only_b(lambda values: values.update(latents=None)),
    "needs `quality` in REPORT": only_b(lambda values: values["report"].pop("quality")),
    "needs the checkpoint's identity": in_both(lambda values: values["report"].pop("checkpoint")),
    "needs cfg_scale of every clip": in_both(lambda values: values["request"].pop("cfg_scale")),
    "needs precision in REPORT": only_b(lambda values: values["report"].pop("precision")),
    "needs evaluations and step_seconds": only_b(lambda values: values["report"].pop("step_seconds")),
    "needs every clip whole": only_b(lambda values: values.update(video="videos/none.mp4")),
    "needs one layout for all clips of B": only_b(
        lambda values: values["report"].update(layout="tp2" if values["id"] == "c1" else "single")
    ),
}


@pytest.mark.parametrize("words", UNPRICED)
def test_what_cannot_be_priced_is_one_sentence(
    both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    UNPRICED[words](*both)
    path = tmp_path / "prices.json"
    assert run("compare", *both, "--out", tmp_path / "out", "--price-file", path) == 2
    assert f"INVALID_ARGUMENT: --price-file {words}" in capsys.readouterr().err
    assert not path.exists()


BAD: dict[str, Callable[[Path, Path], list[object]]] = {
    "must exist": lambda a, b: [a / "none", b],
    "no clip of A is in B": lambda a, b: [a, b.parent / "other"],
    "has seed '7' in A and '8' in B": lambda a, b: [a, b.parent / "seed"],
    "--jobs must be at least 1": lambda a, b: [a, b, "--jobs", "0"],
    "--shown must be at least 0": lambda a, b: [a, b, "--shown", "-1"],
    "--min-psnr must be a finite number": lambda a, b: [a, b, "--min-psnr", "nan"],
    "--out must be a folder": lambda a, b: [a, b, "--out", a / "results.jsonl"],
    "--price-file must be in a folder that exists": lambda a, b: [a, b, "--price-file", a / "none" / "p.json"],
    "compare takes the folders A and B, or --set, got 1": lambda a, b: [a],  # noqa: ARG005
    "say how a --set is made": lambda a, b: [a, b, "--a", "x"],
    "--set needs --a and --b": lambda a, b: [a, b, "--set", a],
    "begin with a server": lambda a, b: ["--set", a, "--a", "quality=exact", "--b", "x"],  # noqa: ARG005
    "take options of batch as NAME=VALUE": lambda a, b: ["--set", a, "--a", "x", "--b", "x", "--with", "out=c"],  # noqa: ARG005
    "--checkpoint and --name are of the price file": lambda a, b: [a, b, "--checkpoint", "x"],
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a and b of one clip, `other` of another one, and `seed` of the same with another seed."""
    folder = tmp_path_factory.mktemp("bad")
    for side in ("a", "b"):
        write_clip(folder / side, "c", frames(0)[:2])
    write_clip(folder / "other", "d", frames(0)[:2])
    write_clip(folder / "seed", "c", frames(0)[:2], change=lambda values: values.update(seed=8))
    return folder


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence(
    bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("compare", *BAD[words](bad / "a", bad / "b")) == 2
    assert words in one_sentence(capsys)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_damaged_latents_are_a_fault_of_the_pair(both: tuple[Path, Path], tmp_path: Path, content: bytes) -> None:
    (both[1] / "latents" / "c0-0.npy").write_bytes(content)
    assert run("compare", *both, "--out", tmp_path / "out") == 1
    faults = [pair["fault"] for pair in result(tmp_path / "out")["pairs"]]
    assert "must be a whole .npy file" in str(faults[0])
    assert faults[1:] == [None] * (CLIPS - 1)


def test_a_threshold_of_what_nobody_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side in ("a", "b"):
        write_clip(tmp_path / side, "c", frames(0)[:3])
    arguments = ["compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out", "--max-latent-error", "1"]
    assert run(*arguments) == 2
    assert "--max-latent-error needs latents of both sides" in capsys.readouterr().err
