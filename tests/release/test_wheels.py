"""The wheels of `make dist`, installed into an environment of their own and run outside the checkout."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import urllib.request
import venv
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from release.version import version_of
from release.wheels import build
from tests.serving.launch import EAGER
from tests.video.decode import decode_mp4

# Where a wheel has a folder of the checkout.
PLACES = {
    "stepvideo_serve": {
        "stepvideo_serve": "stepvideo_serve",
        "model_repository": "stepvideo_serve/model_repository",
        "kernels/stepvideo_kernels": "stepvideo_kernels",
    },
    "stepvideo_client": {"client/stepvideo_client": "stepvideo_client"},
    "stepvideo_gateway": {"gateway/stepvideo_gateway": "stepvideo_gateway"},
}
Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {wheel.name.partition("-")[0]: wheel for wheel in build(tmp_path_factory.mktemp("dist"))}


@pytest.fixture(scope="module")
def programs(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's programs: the wheels, and by a path the dependencies of this environment, whose
    editable installations of the checkout count there no more."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", *map(str, wheels.values())], check=True)
    [packages] = folder.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return folder / "bin"


@pytest.fixture
def run(programs: Path, tmp_path: Path) -> Run:
    """Runs a program of that environment in an empty folder; what it prints on standard output."""

    def run(program: str, *arguments: str) -> str:
        command = [str(programs / program), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=outside(programs), capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def outside(programs: Path) -> dict[str, str]:
    """The environment variables of a caller who has no checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"PATH": f"{programs}{os.pathsep}{kept['PATH']}"}


def test_each_wheel_holds_every_file_of_its_folders_and_its_licence(root: Path, wheels: dict[str, Path]) -> None:
    assert set(wheels) == set(PLACES)
    for name, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            inside = set(archive.namelist())
        info = f"{name}-{version_of(root)}.dist-info/"
        assert f"{info}licenses/LICENSE" in inside
        expected = {
            f"{target}/{path.relative_to(root / folder)}"
            for folder, target in PLACES[name].items()
            for path in (root / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert {path for path in inside if not path.startswith(info)} == expected


def test_the_commands_run_outside_the_checkout(run: Run, programs: Path, root: Path) -> None:
    packages = ("stepvideo_serve", "stepvideo_kernels", "stepvideo_client", "stepvideo_gateway")
    where = run("python", "-c", f"import {', '.join(packages)}\nfor p in ({', '.join(packages)}): print(p.__file__)")
    assert all(Path(line).is_relative_to(programs.parent) for line in where.splitlines())
    for command in (["stepvideo"], ["stepvideo-gateway"], ["python", "-m", "stepvideo_serve"]):
        assert "usage:" in run(*command, "--help")
    said = "".join(run("python", "-m", "stepvideo_serve", "serve", "--help").split())  # lines break anywhere
    assert str(programs.parent) in said.partition("--model-repository")[2]
    plan = json.loads(run("python", "-m", "stepvideo_serve", "layouts", "--gpu", "H100", "--gpus", "8", "--json"))
    assert plan["recommended"]
    assert f"stepvideo-serve {version_of(root)}" in run(
        "python", "-c", "from importlib.metadata import version; print('stepvideo-serve', version('stepvideo-serve'))"
    )


@contextmanager
def gateway(programs: Path, folder: Path) -> Iterator[str]:
    """The address of a gateway that has no server."""
    config = folder / "gateway.toml"
    config.write_text(
        f'[listen]\nport = 0\n[servers]\nurls = ["127.0.0.1:1"]\n[jobs]\nfolder = "{folder / "videos"}"\n'
        f'database = "sqlite+aiosqlite:///{folder / "jobs.sqlite"}"\n',
        encoding="utf-8",
    )
    command = [str(programs / "stepvideo-gateway"), "--config", str(config)]
    with subprocess.Popen(command, cwd=folder, env=outside(programs), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("gateway: ").strip()
        finally:
            process.terminate()


def test_the_gateway_has_its_page_and_its_migrations(programs: Path, tmp_path: Path, root: Path) -> None:
    with gateway(programs, tmp_path) as address:

        def read(path: str) -> bytes:
            with urllib.request.urlopen(f"{address}/{path}", timeout=30) as answer:
                content: bytes = answer.read()
            return content

        found = re.findall(r'(?:src|href)="/?(web/\w+/[\w.-]+)"', read("").decode())
        assert len(found) > 3
        for name in found:
            assert read(name) == (root / "gateway" / "stepvideo_gateway" / "web" / Path(name).name).read_bytes()
        assert json.loads(read("v1/videos"))["data"] == [], "the database has its tables"


def test_a_request_is_served(run: Run, mini_checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(EAGER.format(model=mini_checkpoint, layout="single"), encoding="utf-8")
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(tmp_path / "first.png")
    ask = 'exec stepvideo generate --url "$STEPVIDEO_GRPC_URL" --image first.png --prompt A --out video.mp4 --quiet '
    ask += "--num-frames 17 --height 32 --width 48 --infer-steps 1"
    run("python", "-m", "stepvideo_serve", "run", "--config", str(config), "--log", "log", "--", "sh", "-c", ask)
    frames, *_ = decode_mp4((tmp_path / "video.mp4").read_bytes())
    assert frames.shape == (17, 32, 48, 3)
