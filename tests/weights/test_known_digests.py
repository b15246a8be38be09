"""A file is hashed once while it stays what it is."""

import hashlib
import os
from pathlib import Path

import pytest

from stepvideo_serve.weights import known_digests
from stepvideo_serve.weights.files import file_digest
from stepvideo_serve.weights.known_digests import KnownDigests


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read."""
    found: list[Path] = []

    def digest(path: Path) -> str:
        found.append(path)
        return file_digest(path)

    monkeypatch.setattr(known_digests, "file_digest", digest)
    return found


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_rebuild_reads_nothing_again(tmp_path: Path, weights: Path, hashed: list[Path]) -> None:
    for _ in range(3):
        assert KnownDigests(tmp_path / "known")(weights) == sha256(b"one")
    assert hashed == [weights]


def test_another_start_hashes_again(tmp_path: Path, weights: Path, hashed: list[Path]) -> None:
    for start in ("first", "second"):
        KnownDigests(tmp_path / start)(weights)
    KnownDigests(None)(weights)
    assert len(hashed) == 3


def test_a_file_that_changed_is_hashed_again(tmp_path: Path, weights: Path, hashed: list[Path]) -> None:
    known = KnownDigests(tmp_path / "known")
    known(weights)
    weights.write_bytes(b"two")
    os.utime(weights, ns=(1, 1))
    assert known(weights) == sha256(b"two")
    weights.with_name("other").write_bytes(b"six")
    os.utime(weights.with_name("other"), ns=(1, 1))
    os.replace(weights.with_name("other"), weights)  # of the same size and time: another inode
    assert known(weights) == sha256(b"six")
    assert len(hashed) == 3


def test_a_damaged_record_is_made_again(tmp_path: Path, weights: Path, hashed: list[Path]) -> None:
    known = KnownDigests(tmp_path / "known")
    known(weights)
    [record] = [path for path in (tmp_path / "known").iterdir() if not path.suffix]
    record.write_text("{")
    assert known(weights) == sha256(b"one")
    assert len(hashed) == 2


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        KnownDigests(tmp_path / "known")(tmp_path / "nowhere")


def read(folder: Path, weights: Path) -> str:
    with weights.open("rb") as file:
        content, digest = KnownDigests(folder).read(file, file.read)
    assert content == weights.read_bytes()
    return digest


def test_an_open_file_is_hashed_once(tmp_path: Path, weights: Path) -> None:
    """Shown by a record that is not true: it is believed as long as the file stays what it was."""
    assert read(tmp_path / "known", weights) == sha256(b"one")
    [record] = [path for path in (tmp_path / "known").iterdir() if not path.suffix]
    record.write_text(record.read_text().replace(sha256(b"one"), sha256(b"ten")))
    assert read(tmp_path / "known", weights) == sha256(b"ten")
    assert KnownDigests(tmp_path / "known")(weights) == sha256(b"ten")
    os.utime(weights, ns=(1, 1))
    assert read(tmp_path / "known", weights) == sha256(b"one")


def test_an_edit_whose_time_was_set_back_is_found(tmp_path: Path, weights: Path) -> None:
    known, before = KnownDigests(tmp_path / "known"), weights.stat()
    assert known(weights) == sha256(b"one")
    while weights.stat().st_ctime_ns == before.st_ctime_ns:  # its clock has steps of some milliseconds
        weights.write_bytes(b"two")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    assert known(weights) == read(tmp_path / "known", weights) == sha256(b"two")


def test_a_file_that_changes_while_it_is_read_has_no_record(tmp_path: Path, weights: Path) -> None:
    def read_and_change() -> bytes:
        content = weights.read_bytes()
        weights.write_bytes(b"longer")
        return content

    with weights.open("rb") as file:
        assert KnownDigests(tmp_path / "known").read(file, read_and_change) == (b"one", sha256(b"one"))
    assert read(tmp_path / "known", weights) == sha256(b"longer")
