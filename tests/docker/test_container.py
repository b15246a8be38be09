"""The container's files, as far as they can be tried without a container engine: the entry point runs for real."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import psutil
import pytest

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.launch.install import MINIMUM
from stepvideo_serve.parallel.layout import Layout


@pytest.fixture
def docker(root: Path) -> Path:
    return root / "docker"


@pytest.fixture
def dockerfile(docker: Path) -> str:
    return (docker / "Dockerfile").read_text(encoding="utf-8")


def test_the_configuration_is_one(docker: Path) -> None:
    config = ServeConfig.load(docker / "serve.toml")
    assert (config.model.dir, config.model.engines_dir) == (Path("/model"), Path("/engines"))
    assert Layout.parse(config.denoiser.layout).world_size == 8


def test_the_release_has_no_known_critical_vulnerability(dockerfile: str) -> None:
    tag = re.search(r"^ARG TRITON=nvcr\.io/nvidia/tritonserver:(\d\d)\.(\d\d)-py3$", dockerfile, re.MULTILINE)
    assert tag is not None
    year, month = map(int, tag.groups())
    assert 12 * (year - 26) + month - 7 >= 0
    assert MINIMUM == (2, 71), "the same release under its other name"


def test_everything_copied_is_there_and_sent_to_the_builder(root: Path, dockerfile: str) -> None:
    sent = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
    sources = [source for copy in copies for source in copy.split()]
    assert len(sources) >= 6
    for source in sources:
        assert (root / source).exists(), source
        assert source.split("/")[0] in sent, source


def test_the_process_is_not_root_and_has_no_weights(dockerfile: str) -> None:
    last_stage = dockerfile.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001$", last_stage, re.MULTILINE)
    assert "/model" not in re.sub("/model_repository", "", last_stage)
    assert not re.search(r"^(ADD|COPY) .*https?://", dockerfile, re.MULTILINE)


def entry_point(stage: str) -> list[str]:
    [found] = re.findall(r"^ENTRYPOINT (\[[^]]*\])", stage, re.MULTILINE)
    words: list[str] = json.loads(found.replace("\\\n", ""))
    return words


def test_the_images_own_look_at_the_driver_runs_first(dockerfile: str) -> None:
    _, build, _, serve = dockerfile.split("\nFROM ")
    assert entry_point(serve)[:2] == ["/opt/nvidia/nvidia_entrypoint.sh", "/usr/local/bin/stepvideo"]
    assert entry_point(build)[:2] == ["/opt/nvidia/nvidia_entrypoint.sh", "make"]
    assert "LD_LIBRARY_PATH" not in dockerfile, "it would come before CUDA's compatibility library"


def test_the_image_holds_what_serving_needs_and_no_more(root: Path, dockerfile: str) -> None:
    _, _, packages, serve = dockerfile.split("\nFROM ")
    assert re.findall(r'pip install .* "\.\[(.*)\]"$', packages, re.MULTILINE) == ["${EXTRA}"]
    [extra] = re.findall(r"^ARG EXTRA=(.+)$", packages, re.MULTILINE)
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name in (extra, "gpu-rtx"):
        mine = [re.split(r"[=\[]", one)[0] for one in extras[name] if not one.startswith("stepvideo-serve")]
        assert "cuda-bindings" in mine, "plugins are launched by it"
    assert not [one for one in extras[extra] if "rtx" in one or "export" in one]
    assert not re.search(r"^COPY .*\bexport\b", serve, re.MULTILINE)


def test_the_build_stage_has_what_its_command_needs(root: Path, dockerfile: str, tmp_path: Path) -> None:
    """In a folder with the files of the stage, after its installation, make only builds."""
    stage = dockerfile.split("\nFROM ")[1]
    for copied in re.findall(r"^COPY (.+) \./?\S*$", stage, re.MULTILINE):
        for name in copied.split():
            if (root / name).is_dir():
                shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(root / name, tmp_path / name)

    def printed_by(command: list[str]) -> str:
        done = subprocess.run([*command, "-n"], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    [setup] = re.findall(r"^RUN (make .+)$", stage, re.MULTILINE)
    installed = printed_by(setup.split())
    assert "pip install" in installed
    for folder in re.findall(r"--editable '?([\w./]+)", installed):
        assert (tmp_path / folder / "pyproject.toml").is_file(), f"pip installs {folder}, which the stage must copy"
    for stamp in re.findall(r"^touch (\S+)$", installed, re.MULTILINE):
        (tmp_path / stamp).parent.mkdir(exist_ok=True)
        (tmp_path / stamp).touch()
    for targets in (["engines", "SM=90", "LAYOUT=tp2"], ["verify", "GPU=1"]):
        printed = printed_by([*entry_point(stage)[1:], *targets])
        assert "pip install" not in printed
        modules = set(re.findall(r" -m (\S+)", printed))
        assert modules >= ({"export.to_onnx", "export.build_engine"} if "engines" in targets else {"export.verify"})
        for module in modules:
            path = module.replace(".", "/")
            assert list(tmp_path.glob(f"{path}.py")) + list(tmp_path.glob(f"kernels/{path}/__main__.py")), module
    assert "--backend tensorrt --sm 90" in printed_by([*entry_point(stage)[1:], "engines", "SM=90"])


def run_entrypoint(docker: Path, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(docker / "entrypoint.sh"), *arguments],
        env={**os.environ, "STEPVIDEO_PYTHON": sys.executable, "PYTHONPATH": str(docker.parent), **variables},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_without_a_configuration_it_says_so(docker: Path, tmp_path: Path) -> None:
    process = run_entrypoint(docker, STEPVIDEO_CONFIG=str(tmp_path / "none.toml"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r"error: The configuration must be readable, .*none\.toml: mount it, .*\n", errors)


def test_an_old_release_does_not_listen_on_the_network(docker: Path) -> None:
    config = str(docker / "serve.toml")
    process = run_entrypoint(docker, STEPVIDEO_CONFIG=config, STEPVIDEO_ADDRESS="0.0.0.0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "must listen on loopback" in errors


def test_it_serves_until_it_is_told_to_stop(docker: Path, config_file: Path) -> None:
    ports = ["--grpc-port=0", "--http-port=0", "--metrics-port=0"]
    process = run_entrypoint(docker, *ports, f"--log={config_file.parent / 'log'}", STEPVIDEO_CONFIG=str(config_file))
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        address = re.search(r"HTTP (\S+),", ready)
        assert address is not None, process.communicate()[1]
        with urllib.request.urlopen(f"http://{address[1]}/v2/health/ready", timeout=10) as response:
            assert response.status == 200
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert not psutil.wait_procs(children, timeout=30)[1]
    finally:
        process.kill()
        process.communicate()
