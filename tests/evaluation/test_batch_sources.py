"""Evaluation sets as they are read: entries, sizes, names, and one sentence for each that is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from stepvideo_client import InvalidInput
from stepvideo_client.evaluation.names import names_for
from stepvideo_client.evaluation.plan import Settings, Shard, orientation_of, plan, request_id
from stepvideo_client.evaluation.sources import SHAPES, Entry, EvaluationSet, nearest_ratio, read_set
from tests.evaluation.conftest import write_pair, write_picture
from tests.evaluation.vbench_list import PROMPTS, UNFIT, write_vbench

DEFAULTS = {
    "num_frames": 102,
    "height": 544,
    "width": 992,
    "steps": 50,
    "cfg_scale": 9.0,
    "time_shift": 7.0,
    "motion_score": 5.0,
    "seeds": (0,),
}


def read(path: Path) -> EvaluationSet:
    return read_set(path, None, "8-5")


def test_a_folder_of_pairs(pairs: Path) -> None:
    write_picture(pairs / ".hidden.png")
    found = read(pairs)
    assert found.kind == "pairs"
    assert [(entry.id, entry.prompt, entry.orientation) for entry in found.entries] == [
        ("a_wide", "一只猫伸懒腰。", None),
        ("b_high", "A dog barks.", None),
        ("c_square", "旋转的球", None),
    ]


def test_an_evaluation_tree(tmp_path: Path) -> None:
    """The folder's letter decides, whatever the picture's shape."""
    for style, shape in (("real", "H"), ("real", "V"), ("ani", "S")):
        write_pair(tmp_path / f"ti2v_eval_{style}" / shape, "007", f"{style} {shape}")
    found = read(tmp_path)
    assert found.kind == "eval"
    assert [(entry.id, entry.orientation) for entry in found.entries] == [
        ("ani_S_007", "S"),
        ("real_H_007", "H"),
        ("real_V_007", "V"),
    ]
    assert [entry.id for entry in read(tmp_path / "ti2v_eval_real").entries] == ["H_007", "V_007"]


def test_a_csv(tmp_path: Path) -> None:
    write_picture(tmp_path / "p" / "1.png")
    rows = 'image,prompt,motion_score,id\np/1.png,"two\nlines, a comma",10,first\np/1.png,中文,,\n'
    (tmp_path / "set.csv").write_text("\ufeff" + rows, encoding="utf-8")
    one, other = read(tmp_path / "set.csv").entries
    assert (one.id, one.prompt, one.motion) == ("first", "two\nlines, a comma", 10.0)
    assert (other.id, other.prompt, other.motion) == ("0002", "中文", None)
    assert one.image == tmp_path / "p" / "1.png"


def test_a_vbench_list(tmp_path: Path) -> None:
    found = read(write_vbench(tmp_path))
    assert [entry.prompt for entry in found.entries] == PROMPTS
    assert found.entries[3].id == "0003"
    assert found.entries[3].image == tmp_path / "data" / "crop" / "8-5" / "picture 3.jpg"
    assert len(found.select([], ["i2v_subject"], None)) == 15
    assert [entry.id for entry in found.select(["000*"], ["i2v_subject"], 2)] == ["0001", "0003"]
    with pytest.raises(InvalidInput, match=r"the dimensions i2v_background, i2v_subject\."):
        found.select([], ["camera_motion"], None)


def test_a_vbench_list_names_pictures_or_has_them_by_the_prompt(tmp_path: Path) -> None:
    """Early lists have no image_name for entries of camera motion. What is listed twice is one entry."""
    prompt = "a hill, a tree, camera pans left"
    write_picture(tmp_path / "crops" / "16-9" / "a hill, a tree.jpg")
    listed = [
        {"prompt_en": prompt, "dimension": ["camera_motion"]},
        {"prompt_en": prompt, "dimension": ["temporal_flickering"], "image_name": "a hill, a tree.jpg"},
    ]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(listed))
    [entry] = read_set(path, tmp_path / "crops", "16-9").entries
    assert entry.image.name == "a hill, a tree.jpg"
    assert entry.dimensions == ("camera_motion", "temporal_flickering")


def test_names_are_those_that_vbench_looks_for_or_ids(tmp_path: Path) -> None:
    entries = read(write_vbench(tmp_path)).entries
    names = names_for(entries, clips_each=5)
    for number, entry in enumerate(entries):
        assert names.of(entry.id, 4) == f"{entry.id if number in UNFIT else entry.prompt}-4"
    assert names.unfit.keys() == {f"{number:04}" for number in UNFIT}
    assert all(word in names.unfit[f"{number:04}"] for number, word in UNFIT.items())
    every = [names.of(entry.id, index) for entry in entries for index in range(5)]
    assert len(set(every)) == len(every)
    assert all(len(f"{name}.mp4".encode()) <= 255 and "/" not in name for name in every)


@pytest.mark.parametrize(
    ("size", "ratio"), [((544, 992), "16-9"), ((736, 736), "1-1"), ((64, 96), "8-5"), ((512, 896), "7-4")]
)
def test_the_crops_are_those_of_the_nearest_ratio(size: tuple[int, int], ratio: str) -> None:
    assert nearest_ratio(*size) == ratio


def test_sizes_follow_the_pictures(tmp_path: Path) -> None:
    settings = Settings.resolve({}, DEFAULTS)
    assert (settings.landscape, settings.portrait, settings.square) == ((544, 992), (992, 544), (736, 736))
    assert [settings.size(orientation) for orientation in SHAPES] == [(544, 992), (736, 736), (992, 544)]
    shapes = {(600, 800): "H", (512, 512): "S", (1216, 832): "V", (677, 1000): "H", (1024, 768): "V", (560, 600): "S"}
    for (height, width), orientation in shapes.items():
        assert orientation_of(write_picture(tmp_path / f"{height}x{width}.png", height, width)) == orientation


def test_a_turned_picture_is_taken_as_it_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 50)).save(tmp_path / "turned.jpg", exif=exif)
    assert orientation_of(tmp_path / "turned.jpg") == "V"


def test_the_plan_has_every_preset_motion_and_seed(pairs: Path) -> None:
    given = {"presets": ("exact", "fast"), "motions": (5.0, 10.0), "seeds": (3, 4, 5), "num_frames": 34}
    settings = Settings.resolve(given, DEFAULTS)
    entries = read(pairs).entries
    clips = plan(entries, settings, names_for(entries, settings.clips_each))
    assert len(clips) == 3 * settings.clips_each == 36
    assert [(clip.preset, clip.motion, clip.seed) for clip in clips[4:8]] == [
        ("exact", 10.0, 4),
        ("exact", 10.0, 5),
        ("fast", 5.0, 3),
        ("fast", 5.0, 4),
    ]
    assert [clip.index for clip in clips[:12]] == list(range(12))
    assert clips[13].name == "A dog barks.-1"
    options = clips[13].options(settings)
    assert options == {
        "num_frames": 34,
        "height": 992,
        "width": 544,
        "steps": 50,
        "cfg_scale": 9.0,
        "time_shift": 7.0,
        "motion_score": 5.0,
        "quality": "exact",
        "seed": 4,
    }
    ids = {request_id(clip, clip.options(settings), image) for clip in clips for image in (b"1", b"2")}
    assert len(ids) == 2 * len(clips)
    assert all(len(name) <= 128 and name.isascii() for name in ids)


def test_an_entry_may_have_its_own_motion_score(tmp_path: Path) -> None:
    entry = Entry("x", "words", write_picture(tmp_path / "x.png"), motion=20.0)
    settings = Settings.resolve({"motions": (5.0, 10.0), "seeds": (0, 1)}, DEFAULTS)
    clips = plan([entry], settings, names_for([entry], settings.clips_each))
    assert [(clip.motion, clip.seed) for clip in clips] == [(20.0, 0), (20.0, 1)]


def test_shards_are_the_whole(pairs: Path) -> None:
    entries = read(pairs).entries
    parts = [entry for number in (1, 2) for entry in Shard.parse(f"{number}/2").part(entries)]
    assert sorted(parts, key=lambda entry: entry.id) == list(entries)
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(ValueError, match=r"K must be|invalid literal"):
            Shard.parse(wrong)


def absent_text(folder: Path) -> Path:
    (folder / "a_wide.txt").unlink()
    return folder


def absent_picture(folder: Path) -> Path:
    (folder / "a_wide.png").unlink()
    return folder


def empty_prompt(folder: Path) -> Path:
    (folder / "a_wide.txt").write_text(" \n")
    return folder


def not_utf8(folder: Path) -> Path:
    (folder / "a_wide.txt").write_bytes(b"caf\xe9")
    return folder


def written(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


def vbench(change: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_vbench(folder / "vbench")
        entries = json.loads(path.read_text())
        if change == "picture":
            (folder / "vbench" / "data" / "crop" / "8-5" / "picture 5.jpg").unlink()
        elif change == "crops":
            (folder / "vbench" / "data" / "crop" / "8-5").rename(folder / "vbench" / "8-5")
        else:
            del entries[4][change]
        path.write_text(json.dumps(entries))
        return path

    return write


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "nothing", "must be a folder, a .csv or a .json file that is there"),
        (lambda folder: folder / "a_wide.png", "must be a folder, a .csv or a .json file that is there"),
        (lambda folder: folder.parent / "empty", "has no pair"),
        (absent_text, "needs its prompt in a .txt beside it, and 1 in .* the first is 'a_wide.png'"),
        (absent_picture, "needs its picture beside it, and 1 in .* the first is 'a_wide.txt'"),
        (empty_prompt, "that of 'a_wide' is empty"),
        (not_utf8, "must be UTF-8, and is not: .* at byte 3"),
        (written("s.csv", "picture,prompt\n1.png,x\n"), "must be image and prompt, .* got picture, prompt"),
        (written("s.csv", ""), "got none"),
        (written("s.csv", "image,prompt\na_wide.png\n"), "Line 2 of .* must have 2 cells"),
        (written("s.csv", "image,prompt,motion_score\na_wide.png,x,much\n"), "got 'much' in line 2"),
        (written("s.csv", "image,prompt,id\na_wide.png,x,1\na_wide.png,y,1\n"), "'1' is there more than once"),
        (written("s.csv", "image,prompt,id\na_wide.png,x,../1\n"), r"fit for a file's name .* got '../1'"),
        (written("s.csv", "image,prompt,id\na_wide.png,x," + "i" * 201 + "\n"), "at most 200 bytes, got 201"),
        (written("s.csv", "image,prompt\nnone.png,x\n"), "1 of 1 pictures are absent, the first is .*none.png"),
        (written("s.json", "[{]"), "must be VBench's list as JSON, and is not"),
        (written("s.json", '{"prompt_en": "x"}'), "must be a list of entries, got dict"),
        (vbench("picture"), "1 of 30 pictures are absent, the first is .*picture 5.jpg"),
        (vbench("crops"), "VBench's pictures of ratio 8-5 must be in .* --images"),
        (vbench("prompt_en"), "Entry 4 of .* must have prompt_en"),
        (vbench("dimension"), "Entry 4 of .* and dimension"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(pairs: Path, make: Callable[[Path], Path], words: str) -> None:
    (pairs.parent / "empty").mkdir()
    with pytest.raises(InvalidInput, match=words):
        read(make(pairs))


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(InvalidInput, match=r"The size of the picture '.*x\.png' cannot be read"):
        orientation_of(tmp_path / "x.png")
