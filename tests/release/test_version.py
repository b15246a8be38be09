"""One version: written from one place, and missed where another one stands."""

import shutil
from pathlib import Path

import pytest

import stepvideo_gateway
from release.version import PLACES, main, stale, version_of


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    for name in PLACES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    return tmp_path


def test_one_version(root: Path) -> None:
    assert stale(root, version_of(root)) == []
    assert stepvideo_gateway.__version__ == version_of(root)


def test_a_new_version_is_written_everywhere(root: Path, copy: Path) -> None:
    assert main(["12.3.4"], copy) == 0
    assert (version_of(copy), stale(copy, "12.3.4"), main(["--check"], copy)) == ("12.3.4", [], 0)
    old = version_of(root)
    for name, patterns in PLACES.items():
        before, after = ((folder / name).read_text(encoding="utf-8").splitlines() for folder in (root, copy))
        changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
        assert len(changed) == len(patterns)
        assert all(old_line.replace(old, "12.3.4") == new_line for old_line, new_line in changed)


@pytest.mark.parametrize("name", [name for name in PLACES if name != "pyproject.toml"])
def test_another_version_is_found(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (copy / name).read_text(encoding="utf-8")
    (copy / name).write_text(text.replace(version_of(copy), "9.9.9"), encoding="utf-8")
    assert main(["--check"], copy) == 1
    assert f"{name}: 9.9.9" in capsys.readouterr().err
    assert (main([], copy), main(["--check"], copy)) == (0, 0)


def test_what_is_no_version_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["1.2"], copy) == 1
    assert "three numbers, as 1.2.3, got '1.2'" in capsys.readouterr().err
    assert main(["--check"], copy) == 0
