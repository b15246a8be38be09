"""The folder of a batch: what survives a kill, who may write there, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepvideo_client import InvalidInput
from stepvideo_client.evaluation.folder import BatchFolder
from stepvideo_client.evaluation.plan import Shard
from stepvideo_client.evaluation.results import RESULTS, Clip, append, is_whole, read_clips

WHOLE = Shard(1, 1)


def about(**settings: Any) -> dict[str, Any]:
    return {"set": {"input": "here", "digest": "1"}, "settings": {"latents": False, "seeds": [0], **settings}}


def clip(entry: str = "a", index: int = 0, **other: Any) -> Clip:
    values: dict[str, Any] = {
        "id": entry,
        "index": index,
        "video": f"videos/{entry}-{index}.mp4",
        "image": "a.png",
        "prompt": "一只猫\n",
        "motion": 5.0,
        "seed": 0,
        "preset": "exact",
        "request": {"steps": 2},
        "report": {"seconds": {"total": 1.0}},
        "evaluations_mask": [1, 1],
        "latents": None,
        "server": "127.0.0.1:8001",
        "seconds": 1.5,
        "bytes": 4,
    }
    return Clip(**{**values, **other})


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    clips = [clip("a", 0), clip("a", 1, evaluations_mask=None), clip("b", 0, latents="latents/b-0.npy")]
    for one in clips:
        append(tmp_path, one)
    assert list(read_clips(tmp_path).values()) == clips
    append(tmp_path, clip("a", 1, seconds=9.0))
    assert read_clips(tmp_path)["a", 1].seconds == 9.0
    assert not read_clips(tmp_path / "nowhere")


@pytest.mark.parametrize("cut", [1, 20, 10_000])
def test_a_line_that_was_cut_off_does_not_count_and_is_cut_away(tmp_path: Path, cut: int) -> None:
    """Also one of many kilobytes, such as the report of 200 steps."""
    long = clip("long", report={"step_seconds": [0.123456] * 2000})
    append(tmp_path, clip("a"))
    append(tmp_path, long)
    whole = (tmp_path / RESULTS).read_bytes()
    (tmp_path / RESULTS).write_bytes(whole[:-cut])
    assert list(read_clips(tmp_path)) == [("a", 0)]
    append(tmp_path, clip("b"))
    assert list(read_clips(tmp_path).values()) == [clip("a"), clip("b")]
    (tmp_path / RESULTS).write_bytes(b'{"id": "torn')
    append(tmp_path, long)
    assert list(read_clips(tmp_path).values()) == [long]


def test_a_line_that_is_no_clip_is_named(tmp_path: Path) -> None:
    append(tmp_path, clip("a"))
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"id": "b"}\n')
    with pytest.raises(
        InvalidInput, match=r"Line 2 of .*results.jsonl' is no clip \(expected an object with id, index"
    ):
        read_clips(tmp_path)


def test_a_clip_is_whole_with_all_its_bytes(tmp_path: Path) -> None:
    one = clip("a", latents="latents/a-0.npy")
    for folder in ("videos", "latents"):
        (tmp_path / folder).mkdir()
    assert not is_whole(tmp_path, one)
    (tmp_path / one.video).write_bytes(b"123")
    (tmp_path / "latents" / "a-0.npy").write_bytes(b"1")
    assert not is_whole(tmp_path, one)
    (tmp_path / one.video).write_bytes(b"1234")
    assert is_whole(tmp_path, one)
    (tmp_path / "latents" / "a-0.npy").unlink()
    assert not is_whole(tmp_path, one)


def test_a_folder_goes_on_by_the_same_arguments_only(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with BatchFolder(out, WHOLE) as folder:
        assert folder.stored() is None
        folder.begin(about(), {"0003": "a/b"})
        assert folder.write("videos/" + "n" * 251 + ".mp4", lambda file: file.write(b"12")) == 2
    assert sorted(path.name for path in out.iterdir()) == ["batch.json", "names.json", "videos"]
    assert json.loads((out / "names.json").read_text()) == {"0003": "a/b"}
    moved = {**about(), "set": {"input": "elsewhere", "digest": "1"}}
    with BatchFolder(out, WHOLE) as folder:
        folder.begin(moved, {"0003": "a/b"})
    with (
        BatchFolder(out, WHOLE) as folder,
        pytest.raises(InvalidInput, match=r"other arguments \(settings seeds: \[0\] there, \[0, 1\] here\): repeat"),
    ):
        folder.begin(about(seeds=[0, 1]), {})
    assert sorted(path.name for path in out.iterdir()) == ["batch.json", "names.json", "videos"]


def test_half_files_never_count_and_go(tmp_path: Path) -> None:
    """What a killed process left is removed by the next one, of the same shard."""
    with BatchFolder(tmp_path / "out", WHOLE) as folder:
        folder.begin(about(), {})
        with pytest.raises(OSError, match="full"):
            folder.write("videos/a-0.mp4", fail)
        left = [tmp_path / "out" / ".partial" / name for name in ("1-of-1.77.abc", "2-of-3.77.abc")]
        for path in left:
            path.write_bytes(b"half")
    assert not list((tmp_path / "out" / "videos").iterdir())
    with BatchFolder(tmp_path / "out", WHOLE) as folder:
        folder.begin(about(), {})
        assert [path.exists() for path in left] == [False, True]


def fail(_: object) -> None:
    raise OSError(28, "full")


HOLDER = """
import sys
from pathlib import Path
from stepvideo_client.evaluation.folder import BatchFolder
from stepvideo_client.evaluation.plan import Shard
about = {"set": {"digest": "1"}, "settings": {"latents": False, "seeds": [0]}}
with BatchFolder(Path(sys.argv[1]), Shard.parse(sys.argv[2])) as folder:
    folder.begin(about, {})
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_shard_belongs_to_one_process(root: Path, tmp_path: Path) -> None:
    """Until that process ends, by whatever: the second half may be made meanwhile, the whole may not."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out"), "1/2"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root / "client"
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for shard in (Shard(1, 2), WHOLE):
            with (
                BatchFolder(tmp_path / "out", shard) as folder,
                pytest.raises(InvalidInput, match="Another process makes these clips in"),
            ):
                folder.begin(about(), {})
        with BatchFolder(tmp_path / "out", Shard(2, 2)) as folder:
            folder.begin(about(), {})
        assert (tmp_path / "out" / ".partial").is_dir(), "the other shard needs it"
        holder.kill()
    with BatchFolder(tmp_path / "out", WHOLE) as folder:
        folder.begin(about(), {})
    assert not (tmp_path / "out" / ".partial").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with BatchFolder(tmp_path, WHOLE) as folder, pytest.raises(InvalidInput, match=r"holds other files and no batch"):
        folder.begin(about(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with BatchFolder(tmp_path / "notes.txt", WHOLE) as folder, pytest.raises(InvalidInput, match="must be a folder"):
        folder.stored()
    (tmp_path / "batch.json").write_text('{"format": "another"}')
    with BatchFolder(tmp_path, WHOLE) as folder, pytest.raises(InvalidInput, match="must say 'stepvideo-client batch'"):
        folder.stored()
