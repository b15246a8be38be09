"""Files that somebody else could change, by their modes and owners."""

import os
from pathlib import Path

import pytest

from stepvideo_serve.weights.exposed import exposed

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to others")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a file in a folder."""
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True, mode=0o755)
    (folder / "vae" / "weights").write_bytes(b"")
    for path in (folder, folder / "vae"):
        path.chmod(0o755)
    (folder / "vae" / "weights").chmod(0o644)
    return folder


def test_what_is_its_owners_alone_is_no_matter(model: Path) -> None:
    assert exposed([model, model / "vae" / "weights", model / "absent"]) == []


@pytest.mark.parametrize("part", ["", "vae", "vae/weights"])
def test_what_everybody_may_write_is_told(model: Path, part: str) -> None:
    (model / part).chmod(0o777)
    [sentence] = exposed([model])
    assert sentence.startswith(
        f"{model} must be writable for the server's user alone, everybody may write {model / part},"
    )
    assert "mount the folder read-only" in sentence


def test_a_folder_that_leads_there_counts(model: Path) -> None:
    """Who may write it can put another folder of that name in the place."""
    model.parent.chmod(0o777)
    assert f"everybody may write {model.parent}," in exposed([model])[0]
    model.parent.chmod(0o1777)
    assert exposed([model]) == [], "with the sticky bit others may add, and not exchange"


def test_one_sentence_counts_all(model: Path) -> None:
    for part in ("vae", "vae/weights"):
        (model / part).chmod(0o777)
    [sentence] = exposed([model])
    assert f"may write {model / 'vae'} and 1 more, and so" in sentence


@ROOT_ONLY
def test_another_owner_and_a_group_of_others_are_told(model: Path) -> None:
    weights = model / "vae" / "weights"
    os.chown(weights, 12345, 0)
    assert f"the user 12345 may write {weights}," in exposed([model])[0]
    os.chown(weights, 0, 12345)
    weights.chmod(0o664)
    assert f"the group 12345 may write {weights}," in exposed([model])[0]
    os.chown(weights, 0, 0)
    assert exposed([model]) == [], "root's own group"


def test_a_read_only_mount_is_no_matter() -> None:
    """Whatever the modes there: /sys is one wherever a container is, and this machine may have others."""
    mounts = (line.split()[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines())
    read_only = [path for path in map(Path, mounts) if path.is_dir() and os.statvfs(path).f_flag & os.ST_RDONLY]
    if not read_only:
        pytest.skip("needs a read-only mount")
    assert exposed(read_only[:3]) == []
