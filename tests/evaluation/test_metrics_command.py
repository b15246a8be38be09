"""`stepvideo metrics`: what it writes, in which order, and what it refuses."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepvideo_client.evaluation.statistics import deviations, estimate, rank_correlation
from tests.evaluation.reading import Tags, one_sentence, run
from tests.evaluation.synthetic import Frame, moving, plain, texture, write_clip, write_mp4

STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
given = {words[i][2:]: words[i + 1] for i in range(0, len(words) - 1) if words[i].startswith("--")}
out, dimension = pathlib.Path(given["output_path"]), given["dimension"]
videos = sorted(pathlib.Path(given["videos_path"]).glob("*.mp4"))
(out / "calls.txt").open("a").write(dimension + " " + given.get("mode", "") + chr(10))
results = [{"video_path": str(video), "video_results": index % 2 == 0} for index, video in enumerate(videos)]
score = [0.5, results] if dimension != "camera_motion" else [0.25, {"pan_left": float("nan")}, results]
(out / "results_2026-11-30-18:00:00_full_info.json").write_text("[]")
(out / "results_2026-11-30-18:00:00_eval_results.json").write_text(json.dumps({dimension: score}))
"""


def even(seed: int) -> list[Frame]:
    return moving([(2, 1)] * 33, height=64, width=96 + seed)[:34]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips alike, one with a seam, one that is frozen, one that is black. For reading only."""
    out = tmp_path_factory.mktemp("metrics") / "clips"
    for index in range(4):
        write_clip(out, f"even{index}", even(2 * index))
    steps = [60 if index >= 17 else 0 for index in range(34)]
    seamed = [np.clip(frame.astype(int) + step, 0, 255) for frame, step in zip(even(20), steps, strict=True)]
    write_clip(out, "seamed", [frame.astype(np.uint8) for frame in seamed])
    write_clip(out, "frozen", [texture(64, 96)] * 34)
    write_clip(out, "black", [plain(0)] * 34)
    return out


@pytest.fixture
def folder(clips: Path, tmp_path: Path) -> Path:
    """A copy, whose pictures are its own."""
    shutil.copytree(clips, tmp_path / "clips")
    text = (clips / "results.jsonl").read_text(encoding="utf-8")
    (tmp_path / "clips" / "results.jsonl").write_text(
        text.replace(str(clips), str(tmp_path / "clips")), encoding="utf-8"
    )
    return tmp_path / "clips"


def test_the_worst_come_first_and_the_page_needs_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("metrics", folder, "--sheets", "4") == 0
    said = capsys.readouterr()
    assert "frozen-0: It is frozen" in said.err
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert found["counts"] == {"clips": 7, "unreadable": 0, "incomplete": 0, "black": 1, "frozen": 2}
    names = [clip["id"] for clip in found["clips"]]
    assert set(names[:2]) == {"frozen", "black"}
    assert names[2] == "seamed"
    assert found["clips"][2]["worst"]["figure"] == "seam"
    assert found["clips"][2]["measures"]["seam"] > 3
    even_seams = [clip["measures"]["seam"] for clip in found["clips"] if clip["id"].startswith("even")]
    assert all(0.7 < value < 1.4 for value in even_seams)
    first = [clip["measures"]["first_frame_psnr_db"] for clip in found["clips"]]
    assert min(first) > 30
    assert found["summary"]["motion_px"]["most"] == pytest.approx(5**0.5, rel=0.15)
    tags = Tags((folder / "metrics.html").read_text(encoding="utf-8"))
    sources = [value for _, attributes in tags.found for name, value in attributes.items() if name in ("src", "href")]
    assert sources
    assert all(str(value).startswith("data:image/jpeg;base64,") for value in sources)
    assert [tag for tag, _ in tags.found].count("img") == 4
    assert "a prompt <of> seamed" in tags.text
    assert not {tag for tag, _ in tags.found} & {"of", "link", "script", "iframe"}
    assert "url(" not in (folder / "metrics.html").read_text(encoding="utf-8")


def test_clips_that_are_missing_damaged_or_short(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = folder / "videos" / "even1-0.mp4"
    video.write_bytes(video.read_bytes()[:2000])
    (folder / "videos" / "even2-0.mp4").unlink()
    write_clip(folder, "short", even(0)[:20], change=lambda values: values["report"].update(frames=34))
    out = folder / "made" / "here"
    assert run("metrics", folder, "--out", out) == 1
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert found["counts"] == {"clips": 8, "unreadable": 2, "incomplete": 1, "black": 1, "frozen": 2}
    assert {clip["id"] for clip in found["clips"][:2]} == {"even1", "even2"}
    assert all(clip["measures"] is None for clip in found["clips"][:2])
    assert "It has 20 frames, 14 too few." in capsys.readouterr().err


def test_a_folder_of_bare_videos(tmp_path: Path) -> None:
    write_mp4(tmp_path / "one.mp4", even(0))
    assert run("metrics", tmp_path) == 0
    found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert found["clips"][0]["measures"]["first_frame_psnr_db"] is None
    assert "1 clips have no line in results.jsonl" in found["notes"][0]


def test_pictures_that_moved_are_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    write_clip(folder, "one", even(0)[:2])
    (folder / "pictures").rename(tmp_path / "elsewhere")
    assert run("metrics", folder) == 0
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert found["summary"]["first_frame_psnr_db"] is None
    assert "1 clips was not compared" in found["notes"][0]
    assert run("metrics", folder, "--images", tmp_path / "elsewhere") == 0
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert found["summary"]["first_frame_psnr_db"]["least"] > 30


def test_motion_follows_the_motion_score(tmp_path: Path) -> None:
    for index, speed in enumerate((1, 2, 3)):
        write_clip(tmp_path, f"c{index}", moving([(speed, 0)] * 5), motion=5.0 * speed)
    assert run("metrics", tmp_path) == 0
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["motion_rank"] == pytest.approx(1)


def stand_in(tmp_path: Path, program: str = STAND_IN) -> str:
    path = tmp_path / "vbench stand-in.py"
    path.write_text(program, encoding="utf-8")
    return f"{sys.executable} '{path}' evaluate --mode custom_input"


def test_vbench_is_called_and_merged(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    for name in ("one", "two"):
        write_clip(folder, name, even(0)[:2])
    dimensions = ["dynamic_degree", "camera_motion"]
    command = stand_in(tmp_path)
    for _ in range(2):  # an earlier call's results are replaced
        assert run("metrics", folder, "--vbench", command, "--vbench-dimensions", *dimensions) == 0
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert found["vbench"] == {"dynamic_degree": 0.5, "camera_motion": 0.25}
    by_name = {clip["id"]: clip["vbench"] for clip in found["clips"]}
    assert by_name["one"] == {"dynamic_degree": 1.0, "camera_motion": 1.0}
    assert by_name["two"] == {"dynamic_degree": 0.0, "camera_motion": 0.0}
    calls = (folder / "vbench" / "dynamic_degree" / "calls.txt").read_text(encoding="utf-8")
    assert calls.split() == ["dynamic_degree", "custom_input"] * 2
    assert "VBench" in (folder / "metrics.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise SystemExit(3)", "VBench must end with code 0, got 3"),
        ("pass", "VBench must leave"),
        (STAND_IN.replace("json.dumps({dimension: score})", "'{'"), "it cannot be read"),
        (STAND_IN.replace("{dimension: score}", "{'other': score}"), "it cannot be read"),
        (STAND_IN.replace("index % 2 == 0", "'fine'"), "'fine' is no number"),
    ],
)
def test_a_vbench_that_fails_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: str, words: str
) -> None:
    write_mp4(tmp_path / "one.mp4", even(0)[:2])
    assert run("metrics", tmp_path, "--vbench", stand_in(tmp_path, program), "--vbench-dimensions", "x") == 2
    assert words in one_sentence(capsys)


BAD: dict[str, Callable[[Path], list[object]]] = {
    "must exist": lambda path: [path / "none"],
    "must hold results.jsonl or mp4 files": lambda path: [path],
    "--jobs must be at least 1": lambda path: [path, "--jobs", "0"],
    "--sheets must be at least 0": lambda path: [path, "--sheets", "-1"],
    "--images must be a folder": lambda path: [path, "--images", path / "none"],
    "--vbench must name a program": lambda path: [path / "v", "--vbench", "no-such-program"],
    "--vbench must be a command, got": lambda path: [path / "v", "--vbench", "'open"],
    "--vbench must be a command such as": lambda path: [path / "v", "--vbench", ""],
    "--out must be a folder": lambda path: [path / "v", "--out", path / "v" / "a.mp4"],
    "is no clip": lambda path: [path / "w"],
    "motion of one is 'fast'": lambda path: [path / "x"],
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders v of one video, w of a line that is no clip, and x of one with a wrong value."""
    folder = tmp_path_factory.mktemp("bad")
    for part in ("v", "w"):
        (folder / part).mkdir()
    write_mp4(folder / "v" / "a.mp4", even(0)[:2])
    (folder / "w" / "results.jsonl").write_text("{}\n", encoding="utf-8")
    write_clip(folder / "x", "c", even(0)[:2], change=lambda values: values.update(motion="fast"))
    return folder


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence(bad: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    assert run("metrics", *BAD[words](bad)) == 2
    assert words in one_sentence(capsys)


@pytest.mark.parametrize("command", ["metrics", "compare"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    assert end.value.code == 0
    assert "exit codes" in capsys.readouterr().out


def test_statistics() -> None:
    one = estimate([1.0, 2.0, 3.0, 6.0])
    assert (one.mean, one.least, one.most) == (3, 1, 6)
    assert one.least <= one.low < 3 < one.high <= one.most
    assert estimate([1.0, 2.0, 3.0, 6.0]) == one
    assert estimate([4.0]).as_json() == dict.fromkeys(("mean", "low", "high", "least", "most"), 4.0)
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) is None
    away: list[Any] = deviations([1.0, 2.0, 3.0, None, 100.0])
    assert away[3] == 0
    assert away[4] > 10
    assert deviations([0.0, 2e-5, 0.0, 2e-5, 0.3, 1e-5], 0.01)[4] == pytest.approx(30, rel=0.01), "not thousands"
    assert deviations([1.0, 1.0, 1.0, 9.0])[3] > 3, "the median of deviations is 0 there"
    assert deviations([2.0, 2.0]) == [0, 0]
