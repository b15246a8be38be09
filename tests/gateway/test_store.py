"""Files of jobs: whole or not there, and nothing left of what was removed."""

import os
import shutil
from pathlib import Path

import pytest

from stepvideo_gateway.errors import Unavailable
from stepvideo_gateway.store import INPUT, THUMBNAIL, VIDEO, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "videos")
    made.prepare()
    return made


def test_what_is_written_after_a_removal_is_written_nowhere(store: Store) -> None:
    """As by the thread of a run whose job was deleted meanwhile."""
    store.write("video_1", INPUT, b"picture")
    store.write("video_1", VIDEO, b"video")
    assert (store.read("video_1", INPUT), store.read("video_1", VIDEO)) == (b"picture", b"video")
    store.remove("video_1")
    for name in (VIDEO, THUMBNAIL):
        with pytest.raises(Unavailable, match="cannot be written: No such file"):
            store.write("video_1", name, b"late")
    assert list(store.folder.iterdir()) == []
    store.remove("video_1")


def test_a_removal_that_was_interrupted_is_finished_by_the_next(store: Store) -> None:
    store.write("video_1", INPUT, b"picture")
    (store.folder / "video_1").rename(store.folder / ".video_1")
    store.remove("video_1")
    assert list(store.folder.iterdir()) == []


def test_what_cannot_be_removed_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("video_1", INPUT, b"picture")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a disk that refuses; root may remove everything
    with pytest.raises(Unavailable, match="video_1 could not be removed"):
        store.remove("video_1")


def test_only_pictures_without_a_video_are_forgotten(store: Store) -> None:
    for number in range(4):
        store.write(f"video_{number}", INPUT, b"picture")
    store.write("video_1", VIDEO, b"video")
    store.remove("video_2")
    (store.folder / "lost+found").mkdir()
    for name in ("video_0", "video_1", "lost+found"):
        os.utime(store.folder / name, (1000.0, 1000.0))
    assert store.forgotten(2000.0) == ["video_0"]
    assert Store(store.folder / "none").forgotten(2000.0) == []


def test_a_folder_that_cannot_be_written_is_noticed(store: Store, tmp_path: Path) -> None:
    store.check()
    assert list(store.folder.iterdir()) == []
    shutil.rmtree(store.folder)
    (tmp_path / "videos").write_bytes(b"")
    with pytest.raises(Unavailable, match="cannot be written: Not a directory"):
        store.check()


def test_no_id_leads_out_of_the_folder(store: Store) -> None:
    for job_id in ("..", "a/b", ""):
        with pytest.raises(ValueError, match="letters, digits and _"):
            store.path(job_id, VIDEO)
