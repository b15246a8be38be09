"""The machine: each thing that the doctor looks at, as it is when it is wrong."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stepvideo_serve.doctor.finding import Level
from stepvideo_serve.doctor.of_machine import LEAST_SHARED_BYTES, largest_frames_bytes, shared_room
from stepvideo_serve.launch import leftovers
from stepvideo_serve.launch.options import ServerOptions
from tests.doctor.conftest import Doctor, Examined


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_port_that_is_taken(examined: Examined, options: ServerOptions, taken: int) -> None:
    [row] = examined(how=replace(options, metrics_port=taken))["ports"]
    assert row.level is Level.FAULT
    assert f"The metrics port must be free, but 127.0.0.1:{taken} cannot be used (Address already in use)" in row.found
    assert "--metrics-port" in row.remedy
    [row] = examined()["ports"]
    assert row.level is Level.OK


def test_a_server_that_may_not_listen_there(examined: Examined, options: ServerOptions) -> None:
    [row] = examined(how=replace(options, address="0.0.0.0"))["server"]
    assert row.level is Level.FAULT
    assert "must listen on loopback, got the address 0.0.0.0" in row.found
    assert examined(how=replace(options, address="0.0.0.0", allow_outdated=True))["server"][0].level is Level.OK


def test_a_model_repository_that_is_not_there(examined: Examined, tmp_path: Path) -> None:
    row = examined(how=ServerOptions(tmp_path / "none"))["server"][0]
    assert (row.level, row.remedy) == (Level.FAULT, "correct --model-repository")


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({}, Level.OK),
        ({"no_proxy": "127.0.0.1"}, Level.OK),
        ({"http_proxy": "http://proxy:3128"}, Level.WARNING),
        ({"GRPC_PROXY": "http://proxy:3128", "no_proxy": "localhost"}, Level.WARNING),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "localhost, 127.0.0.1"}, Level.OK),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "*"}, Level.OK),
        ({"http_proxy": ""}, Level.OK),
    ],
)
def test_a_proxy_on_the_way(examined: Examined, environ: dict[str, str], level: Level) -> None:
    [row] = examined(**environ)["proxies"]
    assert row.level is level
    if level is Level.WARNING:
        assert "proxy:3128" in row.found
        assert "add 127.0.0.1 to no_proxy" in row.remedy


def test_a_proxy_before_the_collector_of_traces(examined: Examined, config: Path) -> None:
    with config.open("a") as file:
        file.write('[telemetry]\notlp_endpoint = "http://collector.example.org:4318"\n')
    [row] = examined(http_proxy="http://proxy:3128", no_proxy="127.0.0.1")["proxies"]
    assert row.level is Level.WARNING
    assert "collector of traces at collector.example.org" in row.found
    [row] = examined(http_proxy="http://proxy:3128", no_proxy="127.0.0.1,.example.org")["proxies"]
    assert row.level is Level.OK


def test_shared_memory_that_cannot_be_written(
    examined: Examined, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path / "none")
    [row] = examined()["shared memory"]
    assert row.level is Level.FAULT
    assert "no file could be made in it" in row.found
    assert "mount a tmpfs" in row.remedy


def test_the_look_leaves_nothing_in_shared_memory(examined: Examined) -> None:
    def claims() -> set[str]:
        return {path.name for path in leftovers.SHARED_MEMORY.glob(f"stepvideo_*_{leftovers.CLAIM}")}

    before = claims()
    examined()
    assert claims() <= before


def test_shared_memory_that_is_too_small() -> None:
    assert largest_frames_bytes(102 // 17 * 3 * 34 * 62) == 102 * 544 * 992 * 3
    largest = 300 << 20
    levels = [next(shared_room(free, largest)) for free in (1 << 20, LEAST_SHARED_BYTES, 2 << 30)]
    assert [found.level for found in levels] == [Level.FAULT, Level.WARNING, Level.OK]
    assert "1 MiB free, the models alone need 16" in levels[0].found
    assert "--shm-size 617m" in levels[1].remedy


@pytest.mark.parametrize(
    ("limit", "level", "said"),
    [
        ("ulimit -n 100", "fault", "A process may have 100 open files"),
        ("ulimit -n 900", "warning", "A process may have 900 open files"),
        ("ulimit -f 1024", "fault", "A file may have 1,048,576 bytes"),
        ("ulimit -v 500000000", "warning", "A process may map 488,281 MiB"),
    ],
)
def test_limits_of_processes(doctor: Doctor, limit: str, level: str, said: str) -> None:
    done = doctor(before=("bash", "-c", f'{limit}; exec "$@"', "bash"))
    [line] = [line for line in done.stdout.splitlines() if " limits " in line]
    assert line.startswith(level)
    assert said in line
    assert done.returncode == (1 if level == "fault" else 0)


def test_fewer_cores_than_ranks(doctor: Doctor, config: Path) -> None:
    with config.open("a") as file:
        file.write('[denoiser]\nlayout = "cfg2"\n')
    done = doctor(before=("taskset", "-c", "0"))
    assert "1 cores may be used (affinity and quota of the container) by 2 ranks" in done.stdout
    assert done.returncode == 0


def test_more_threads_than_cores(examined: Examined, config: Path) -> None:
    with config.open("a") as file:
        file.write("[denoiser]\nthreads = 100000\n")
    [row] = examined()["cores"]
    assert row.level is Level.WARNING
    assert "lower [denoiser] threads" in row.remedy


def test_a_full_folder_for_temporary_files(examined: Examined, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    [row] = examined()["disk"]
    assert row.level is Level.FAULT
    assert "set TMPDIR to another" in row.remedy
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "gone"))
    [row] = examined()["disk"]
    assert (row.level, "must be writable" in row.found) == (Level.FAULT, True)


def test_the_log(examined: Examined, options: ServerOptions, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wanted = {"new/server.log": Level.OK, "file": Level.OK, "file/server.log": Level.FAULT, "": Level.FAULT}
    for name, level in wanted.items():
        [row] = examined(how=replace(options, log=tmp_path / name))["log"]
        assert row.level is level, name
    assert examined()["log"][0].level is Level.OK
