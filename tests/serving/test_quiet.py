"""One generation as users make it, where the paths are Chinese, the locale is C, a proxy is set that leads nowhere,
and every connection is watched: by the server, its ranks and the client, and by an export."""

import ipaddress
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serving.launch import Engines

TRACE = ("strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o")
ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')
CONFIG = """
[model]
dir = "检查点"
engines_dir = "{engines}"
backend = "{backend}"

[denoiser]
threads = 1
"""
GENERATE = """exec "$0" -m stepvideo_client generate --url "$STEPVIDEO_GRPC_URL" --image "$1" --prompt 一只猫 \
    --num-frames 17 --height 64 --width 96 --infer-steps 2 --out "$2" --json --quiet"""


@dataclass
class Journey:
    """What was run: its exit code and output, the home folder that it had, and the addresses that it asked."""

    code: int
    said: str
    home: Path
    asked: set[str]


def watched(root: Path, folder: Path, *command: str) -> Journey:
    """Runs it with an empty home and a useless proxy; under strace, where there is one."""
    home, trace = folder / "home", folder / "trace"
    home.mkdir()
    noise = ("no_proxy", "NO_PROXY", "ORT_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")
    env = {name: value for name, value in os.environ.items() if name not in noise}
    env |= {"HOME": str(home), "LC_ALL": "C", "http_proxy": "http://127.0.0.1:1", "PYTHONIOENCODING": "utf-8"}
    tracer = (*TRACE, str(trace)) if shutil.which("strace") else ()
    done = subprocess.run(
        [*tracer, *command], cwd=root, env=env, capture_output=True, text=True, encoding="utf-8", check=False
    )
    lines = trace.read_text(encoding="utf-8", errors="replace").splitlines() if tracer else []
    asked = {next(filter(None, found.groups())) for line in lines for found in ADDRESS.finditer(line)}
    return Journey(done.returncode, done.stdout + done.stderr, home, asked)


def assert_quiet(journey: Journey) -> None:
    assert not list(journey.home.rglob("*")), "something was kept in the home folder"
    if not shutil.which("strace"):
        pytest.skip("needs strace to see connections: install it")
    bare = [address.removeprefix("::ffff:") for address in journey.asked]
    assert all(ipaddress.ip_address(address).is_loopback for address in bare), journey.asked


@pytest.fixture(scope="module")
def place(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name and whose files' names are not ASCII, with a configuration for each backend."""
    folder = tmp_path_factory.mktemp("place") / "模型 é"
    folder.mkdir()
    (folder / "检查点").symlink_to(engines.model_dir)
    (folder / "引擎").symlink_to(engines.graphs_dir)
    for backend, graphs in (("ort", "引擎"), ("eager", "none")):
        (folder / f"配置-{backend}.toml").write_text(CONFIG.format(engines=graphs, backend=backend), encoding="utf-8")
    return folder


@pytest.mark.parametrize("backend", ["ort", "eager"])
def test_a_generation_asks_nobody_and_any_path_will_do(
    root: Path, place: Path, picture: bytes, tmp_path: Path, backend: str
) -> None:
    image, video = place / "图.png", place / f"视频-{backend}.mp4"
    image.write_bytes(picture)
    journey = watched(
        root,
        tmp_path,
        *(sys.executable, "-m", "stepvideo_serve", "run", f"--config={place / f'配置-{backend}.toml'}"),
        *(f"--log={place / '日志' / f'{backend}.log'}", "--", "sh", "-c", GENERATE),
        *(sys.executable, str(image), str(video)),
    )
    assert journey.code == 0, journey.said
    assert video.read_bytes()[4:8] == b"ftyp"
    assert "successfully loaded 'ti2v'" in (place / "日志" / f"{backend}.log").read_text(encoding="utf-8")
    if shutil.which("strace"):
        assert "127.0.0.1" in journey.asked, "the client was not seen"
    assert_quiet(journey)


def test_an_export_asks_nobody(root: Path, engines: Engines, tmp_path: Path) -> None:
    arguments = (
        "--model-dir",
        str(engines.model_dir),
        "--out",
        str(tmp_path / "graphs"),
        "--only",
        "dit_final",
        "--quiet",
    )
    journey = watched(root, tmp_path, sys.executable, "-m", "export.to_onnx", *arguments)
    assert journey.code == 0, journey.said
    assert_quiet(journey)
