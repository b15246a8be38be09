"""The real server with the tiny random checkpoint, started once for all tests here."""

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepvideo_serve.assembly.stages import LocalStages
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.launch.server import TritonServer
from tests.server_deaths import WatchServer
from tests.serving.calls import Server, Values
from tests.serving.launch import CONFIG, MAX_QUEUED, Engines, exclusive, export_graphs, serving


@pytest.fixture(scope="session")
def engines(root: Path) -> Engines:
    """The tiny random checkpoint and its graphs, in build/; made once and again when their code changes."""
    build = root / "build"
    with exclusive(build / "tests.lock"):
        tiny = [sys.executable, "-m", "export.tiny_checkpoint", "--out", str(build / "tiny")]
        subprocess.run(tiny, cwd=root, check=True)
        return export_graphs(root, build / "tiny", build / "onnx")


@pytest.fixture(scope="session")
def config_text(engines: Engines) -> str:
    return CONFIG.format(model=engines.model_dir, engines=engines.graphs_dir, max_queued=MAX_QUEUED)


@pytest.fixture(scope="session")
def triton(
    root: Path, config_text: str, tmp_path_factory: pytest.TempPathFactory, watch: WatchServer
) -> Iterator[TritonServer]:
    with serving(root, tmp_path_factory.mktemp("server"), config_text, watch) as running:
        yield running


@pytest.fixture(scope="session")
def server(triton: TritonServer) -> Server:
    """The server of most tests: requests up to 102 frames of 512x512, MAX_QUEUED of them may wait."""
    return Server(triton.grpc_url, triton.http_url, triton.pid)


@pytest.fixture(scope="session")
def config(triton: TritonServer) -> ServeConfig:
    """What the server was started with."""
    assert triton.options.config is not None
    return ServeConfig.load(triton.options.config)


@pytest.fixture(scope="session")
def local(config: ServeConfig) -> LocalStages:
    """The same pipeline in this process."""
    return LocalStages(config)


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A PNG with structure in all channels."""
    y, x = np.mgrid[0:96, 0:144]
    rgb = np.stack([x * 255 // 143, y * 255 // 95, (x * y) % 256], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def small(picture: bytes) -> Values:
    """The smallest request, of a fraction of a second; a test adds what it is about."""
    return {
        "PROMPT": "一只猫 jumps".encode(),
        "IMAGE": picture,
        "NUM_FRAMES": np.array([17], np.int32),
        "HEIGHT": np.array([64], np.int32),
        "WIDTH": np.array([96], np.int32),
        "STEPS": np.array([2], np.int32),
        "SEED": np.array([7], np.int64),
        "OUTPUT": b"latents",
    }


@pytest.fixture(scope="session")
def long(picture: bytes) -> Values:
    """A run of hours, each of whose steps takes a good part of a second."""
    size = {"NUM_FRAMES": 34, "HEIGHT": 192, "WIDTH": 192, "STEPS": 100_000}
    numbers = {name: np.array([value], np.int32) for name, value in size.items()}
    return {"PROMPT": b"a cat", "IMAGE": picture, "OUTPUT": b"latents", "SEED": np.array([7], np.int64), **numbers}
