"""Old Triton releases stay on loopback; which libraries the server's processes find."""

import os
import sysconfig
from pathlib import Path

import pytest

from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch import install
from stepvideo_serve.launch.install import (
    check_exposure,
    is_loopback,
    outdated,
    server_environment,
    server_home,
    server_version,
)
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer, serve_main


def home_of(folder: Path, version: str | None) -> Path:
    if version is not None:
        (folder / "TRITON_VERSION").write_text(version)
    return folder


@pytest.mark.parametrize(
    ("text", "version"),
    [("2.74.0\n", (2, 74)), ("2.71", (2, 71)), ("2.51.0", (2, 51)), ("next", None), ("", None), (None, None)],
)
def test_the_version_is_read(tmp_path: Path, text: str | None, version: tuple[int, int] | None) -> None:
    assert server_version(home_of(tmp_path, text)) == version


@pytest.mark.parametrize(("version", "old"), [("2.71.0", False), ("3.0.0", False), ("2.70.9", True), (None, True)])
def test_releases_from_26_07_on_may_be_reached(tmp_path: Path, version: str | None, old: bool) -> None:
    home = home_of(tmp_path, version)
    assert (outdated(home) is not None) is old
    check_exposure(home, "127.0.0.1", allow_outdated=False)
    check_exposure(home, "0.0.0.0", allow_outdated=True)
    if old:
        with pytest.raises(SetupError, match=r"before 26\.07 \(2\.71\) .*CVE-2026-24207.* got the address 0\.0\.0\.0"):
            check_exposure(home, "0.0.0.0", allow_outdated=False)
    else:
        check_exposure(home, "0.0.0.0", allow_outdated=False)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        *((address, True) for address in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((address, False) for address in ("0.0.0.0", "10.0.0.1", "::", "example.org")),
    ],
)
def test_loopback(address: str, local: bool) -> None:
    assert is_loopback(address) is local


def test_the_server_here_is_not_started_on_another_address(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outdated(server_home()) is not None, "this test is about the server of the wheel"
    with pytest.raises(SetupError, match="must listen on loopback"):
        TritonServer(ServerOptions(root / "model_repository", address="0.0.0.0")).start()
    assert serve_main(["--address", "0.0.0.0"]) == 1
    assert "--allow-outdated-server" in capsys.readouterr().err


@pytest.mark.parametrize("before", [None, "/opt/vendor/lib"])
def test_the_server_of_the_wheel_finds_pythons_library(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    set_library_path(monkeypatch, before)
    folders = server_environment(None)["LD_LIBRARY_PATH"].split(os.pathsep)
    assert folders == [sysconfig.get_config_var("LIBDIR"), *([before] if before else [])]


@pytest.mark.parametrize("before", [None, "/opt/vendor/lib"])
def test_nothing_goes_before_the_images_own_libraries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str | None
) -> None:
    """LD_LIBRARY_PATH is searched before ld.so.cache, where the image names CUDA's compatibility library."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tritonserver").touch()
    monkeypatch.setattr(install, "IMAGE_SERVER", tmp_path)
    set_library_path(monkeypatch, before)
    assert server_environment(None).get("LD_LIBRARY_PATH") == before


def set_library_path(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    if value is not None:
        monkeypatch.setenv("LD_LIBRARY_PATH", value)
