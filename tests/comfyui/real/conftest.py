"""A real ComfyUI with the pack, a real gateway, the real server with the toy world's checkpoint: each started once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepvideo_serve.launch.server import TritonServer
from tests.comfyui.real.comfy import Comfy, comfy_process
from tests.gateway.conftest import CONFIG, Running, gateway_process, health, until
from tests.server_deaths import WatchServer
from tests.serving.launch import exclusive, export_graphs, serving
from toyworld.first_image import centred_scene
from toyworld.samples import first_image, png

SERVE = """
[model]
dir = "{model}"
engines_dir = "{engines}"

[limits]
max_steps = 100000

[defaults]
num_frames = 34
height = 64
width = 64
steps = 20
cfg_scale = 4.0
"""


@pytest.fixture(scope="session")
def triton(root: Path, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer) -> Iterator[TritonServer]:
    model, graphs = root / "toyworld" / "checkpoint", root / "build" / "toyworld"
    with exclusive(root / "build" / "tests.lock"):
        export_graphs(root, model, graphs)
    text = SERVE.format(model=model, engines=graphs)
    with serving(root, tmp_path_factory.mktemp("server"), text, watch) as running:
        yield running


@pytest.fixture(scope="session")
def start(root: Path, triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Starts a gateway in front of the server, with a database of its own."""

    def begin() -> Any:
        folder = tmp_path_factory.mktemp("gateway")
        config = folder / "gateway.toml"
        database = "sqlite+aiosqlite:///jobs.sqlite"
        text = CONFIG.format(port=0, urls=f'["{triton.grpc_url}"]', database=database, folder="videos")
        config.write_text(text, encoding="utf-8")
        return gateway_process(root, config, folder / "log")

    return begin


@pytest.fixture(scope="session")
def gateway(start: Callable[[], Any]) -> Iterator[Running]:
    with start() as running:
        until(lambda: health(running)["well"], "the server to be seen")
        yield running


@pytest.fixture(scope="session")
def comfy(root: Path, gateway: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    """ComfyUI whose environment has the gateway's address, so that workflows need none."""
    checkout, python = (os.environ.get(name, "") for name in ("COMFYUI", "COMFYUI_PYTHON"))
    assert checkout and python, "make test-comfyui COMFYUI=DIR: the folder of a ComfyUI checkout is needed"  # noqa: PT018
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "output"):
        (base / name).mkdir()
    (base / "custom_nodes" / "step-video").symlink_to(root / "comfyui")
    (base / "input" / "example.png").write_bytes(png(first_image(centred_scene("circle", "red", 0))))
    with comfy_process(Path(checkout), python, base, {"STEPVIDEO_URL": gateway.url}) as running:
        yield running
