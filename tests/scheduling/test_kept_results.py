"""Kept results in memory and in files, without a server: time and room are given."""

from pathlib import Path

import numpy as np
import pytest

from stepvideo_serve.errors import WorkerFailed
from stepvideo_serve.scheduling.kept_results import KeptResults, Outputs, read_result, size_of, write_result
from tests.scheduling.test_idempotency import Clock, outputs

MARK = b"inputs"


@pytest.fixture
def kept(tmp_path: Path) -> KeptResults:
    """With room for two results of 1,000 bytes in memory and for two in files."""
    return KeptResults(60.0, 2000, tmp_path / "results", 2000)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "results").glob("*"))


def test_a_result_is_the_same_from_a_file(tmp_path: Path) -> None:
    result: Outputs = {
        "VIDEO": np.array([bytes(range(256)) + b"\0\0"], np.object_),
        "REPORT": np.array([b""], np.object_),
        "FRAMES": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
        "LATENTS": np.array([[0.1, np.nan]], np.float32),
        "SEED": np.array([2**32 - 1], np.int64),
    }
    path = tmp_path / "new" / "1.npz"
    write_result(path, result)
    read = read_result(path)
    assert read.keys() == result.keys()
    for name, array in result.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read[name], array)
    assert [oct(each.stat().st_mode & 0o777) for each in (path, path.parent)] == ["0o600", "0o700"]


def test_promised_results_go_to_files_when_memory_is_full(kept: KeptResults, tmp_path: Path) -> None:
    for number in range(4):
        assert kept.put(str(number), MARK, outputs(1000, number=number), keep_s=10.0)
    assert (kept.size_bytes, kept.file_bytes, len(files(tmp_path))) == (2000, 2000, 2)
    for number in range(4):
        found = kept.get(str(number))
        assert found is not None
        np.testing.assert_array_equal(found.outputs["VIDEO"], outputs(1000, number=number)["VIDEO"])
    assert kept.drop("3")
    assert not kept.drop("3")
    assert (kept.file_bytes, len(files(tmp_path))) == (1000, 1)


def test_what_was_promised_to_nobody_makes_room_first(kept: KeptResults, tmp_path: Path) -> None:
    kept.put("a", MARK, outputs(1000), keep_s=0.0)
    kept.put("b", MARK, outputs(1000), keep_s=10.0)
    kept.put("c", MARK, outputs(1000), keep_s=10.0)
    assert [kept.get(request_id) is not None for request_id in "abc"] == [False, True, True]
    assert not kept.put("d", MARK, outputs(1000), keep_s=0.0), "and never takes the place of a promised one"
    assert (kept.size_bytes, files(tmp_path)) == (2000, [])


def test_a_promise_without_room_is_logged(kept: KeptResults, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        kept.put(str(number), MARK, outputs(1000), keep_s=10.0)
    assert not kept.put("5", MARK, outputs(1000), keep_s=10.0)
    assert "result_lost: 5 has 1000 bytes" in caplog.text
    assert kept.file_bytes == 2000


def test_a_full_disk_loses_that_result_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "results").write_bytes(b"no folder")
    kept = KeptResults(60.0, 0, tmp_path / "results", 10_000)
    assert not kept.put("a", MARK, outputs(1000), keep_s=10.0)
    assert "a result could not be written" in caplog.text
    assert (kept.file_bytes, kept.get("a")) == (0, None)


def test_files_go_when_their_time_is_over(tmp_path: Path) -> None:
    clock = Clock()
    kept = KeptResults(5.0, 0, tmp_path / "results", 10_000, clock)
    kept.put("a", MARK, outputs(1000), keep_s=10.0)
    clock.now_s = 9.9
    found = kept.get("a")
    assert found is not None
    clock.now_s = 10.0
    assert kept.get("a") is None
    assert (kept.file_bytes, files(tmp_path)) == (0, [])
    with pytest.raises(WorkerFailed, match="it has just gone: send the request again"):
        _ = found.outputs


def test_the_size_is_that_of_the_tensors() -> None:
    assert size_of({"A": np.array([b"12345"], np.object_), "B": np.zeros((2, 3), np.float32)}) == 29
