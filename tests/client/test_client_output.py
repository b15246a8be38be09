"""Where the client's files go: what is no regular file stays what it is, and links are followed."""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

import stepvideo_client
from stepvideo_client.output import save_bytes
from tests.client.fake_server import JPEG, MP4, FakeServer, final, result, step

Cli = Callable[..., subprocess.CompletedProcess[str]]


def generate(server: FakeServer, image: Path, *more: object) -> tuple[object, ...]:
    return ("generate", "--url", server.url, "--image", image, "--prompt", "a cat", *more)


def null_device(folder: Path) -> Path:
    """A device that swallows what it gets: one of the test's own, where the test may make one."""
    node = folder / "null"
    try:
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        return Path(os.devnull)
    return node


def test_a_device_stays_a_device(server: FakeServer, cli: Cli, image: Path, tmp_path: Path) -> None:
    node = null_device(tmp_path)
    done = cli(*generate(server, image, "--out", node, "--json", node.parent / "null"))
    assert done.returncode == 2, "the report must be another file"
    done = cli(*generate(server, image, "--out", node))
    assert done.returncode == 0, done.stderr
    assert stat.S_ISCHR(node.stat().st_mode)
    assert f"{node}: 0.3 kB, seed 7" in done.stdout


def test_a_pipe_gets_the_video_and_another_the_report(
    server: FakeServer, cli: Cli, image: Path, tmp_path: Path
) -> None:
    pipes = {name: tmp_path / name for name in ("video.mp4", "report.json")}
    got: dict[str, bytes] = {}
    readers = []
    for name, pipe in pipes.items():
        os.mkfifo(pipe)
        readers.append(threading.Thread(target=lambda name=name, pipe=pipe: got.update({name: pipe.read_bytes()})))
        readers[-1].start()
    done = cli(*generate(server, image, "--out", pipes["video.mp4"], "--json", pipes["report.json"]))
    assert done.returncode == 0, done.stderr
    for reader in readers:
        reader.join(10)
    assert got["video.mp4"] == MP4
    assert json.loads(got["report.json"])["bytes"] == len(MP4)
    assert all(stat.S_ISFIFO(pipe.stat().st_mode) for pipe in pipes.values())


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed(server: FakeServer, cli: Cli, image: Path, tmp_path: Path, there: bool) -> None:
    store = tmp_path / "store"
    store.mkdir()
    links = {name: tmp_path / name for name in ("V.mp4", "V.json", "step_0001.jpg")}
    for name, link in links.items():
        link.symlink_to(store / name)
        if there:
            (store / name).write_bytes(b"old")
    server.script = [step(1, 1, PREVIEW=JPEG), result(), final()]
    previews = ("--preview-every", 1, "--preview-dir", tmp_path)
    done = cli(*generate(server, image, "--out", links["V.mp4"], "--json", links["V.json"], *previews))
    assert done.returncode == 0, done.stderr
    assert all(link.is_symlink() for link in links.values())
    assert (store / "V.mp4").read_bytes() == MP4
    assert (store / "step_0001.jpg").read_bytes() == JPEG
    assert json.loads((store / "V.json").read_text())["seed"] == 7
    assert sorted(path.name for path in store.iterdir()) == sorted(links)


def test_a_link_into_a_missing_folder_is_refused_before_the_server_is_asked(
    server: FakeServer, cli: Cli, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "V.mp4").symlink_to(tmp_path / "none" / "V.mp4")
    done = cli(*generate(server, image, "--out", tmp_path / "V.mp4"))
    assert done.returncode == 2
    assert "'V.mp4" not in done.stderr
    assert f"{str(tmp_path / 'none')!r} does not" in done.stderr
    assert not server.requests


def standard_output(
    server: FakeServer, image: Path, *more: object, stdout: BinaryIO | int
) -> "subprocess.CompletedProcess[bytes]":
    env = {**os.environ, "PYTHONPATH": str(Path(stepvideo_client.__file__).parents[1])}
    line = [sys.executable, "-m", "stepvideo_client", *map(str, generate(server, image, *more))]
    return subprocess.run(line, stdout=stdout, stderr=subprocess.PIPE, env=env, check=False, timeout=60)


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_standard_output_gets_the_video_and_nothing_else(
    server: FakeServer, image: Path, tmp_path: Path, name: str
) -> None:
    piped = standard_output(server, image, "--out", name, "--quiet", stdout=subprocess.PIPE)
    assert piped.stdout == MP4, piped.stderr
    with (tmp_path / "redirected").open("wb") as file:
        standard_output(server, image, "--out", name, "--quiet", stdout=file)
    assert (tmp_path / "redirected").read_bytes() == MP4
    if name == "-":
        assert standard_output(server, image, "--out", name, stdout=subprocess.PIPE).stdout == MP4
        refused = standard_output(server, image, "--out", name, "--json", stdout=subprocess.PIPE)
        assert (refused.returncode, refused.stdout) == (2, b"")


@pytest.mark.parametrize("name", ["V.webm", "V.gif", "V.mp4.part"])
def test_a_name_that_promises_another_format_is_refused(
    server: FakeServer, cli: Cli, image: Path, tmp_path: Path, name: str
) -> None:
    done = cli(*generate(server, image, "--out", tmp_path / name))
    assert done.returncode == 2
    assert name in done.stderr
    assert not server.requests


def test_a_console_that_cannot_show_the_name_is_no_failure(server: FakeServer, image: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(stepvideo_client.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    out = tmp_path / "视频.mp4"
    line = [sys.executable, "-m", "stepvideo_client", *map(str, generate(server, image, "--out", out))]
    done = subprocess.run(line, capture_output=True, env=env, check=False, timeout=60)
    assert (done.returncode, out.read_bytes()) == (0, MP4), done.stderr
    assert rb"\u89c6\u9891.mp4: 0.3 kB" in done.stdout


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        assert save_bytes(path, b"new") == 3
        assert (reader.read(), path.read_bytes()) == (b"old", b"new")


def test_a_name_that_somebody_foresaw_is_not_written_through(tmp_path: Path) -> None:
    """The part of before was called by the process: a link of that name led what was written elsewhere."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / f".file.{os.getpid()}.part").symlink_to(victim)
    save_bytes(tmp_path / "file", b"new")
    assert victim.read_bytes() == b"mine"


def test_parts_have_new_names_and_are_made_by_who_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    opened: list[int] = []
    original = os.open

    def watched(path: Path, flags: int, mode: int = 0o777) -> int:
        made.append(Path(path).name)
        opened.append(flags)
        return original(path, flags, mode)

    monkeypatch.setattr(os, "open", watched)
    for _ in range(2):
        save_bytes(tmp_path / "file", b"new")
    assert len(set(made)) == 2
    assert all(flags & os.O_EXCL and flags & os.O_CREAT for flags in opened)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_private_file_stays_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o600)
    save_bytes(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    save_bytes(tmp_path / "fresh", b"new")
    (tmp_path / "plain").touch()
    assert (tmp_path / "fresh").stat().st_mode == (tmp_path / "plain").stat().st_mode, "as the umask says"
