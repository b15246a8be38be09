"""The TensorRT runners up to the driver."""

import sys
from pathlib import Path

import pytest
import torch

from stepvideo_serve.engine.manifest import GraphFile
from stepvideo_serve.engine.nvinfer import (
    PACKAGES,
    ActivationMemory,
    checked_file,
    load_tensorrt,
    require_room,
)
from stepvideo_serve.errors import EngineError, MemoryShortage
from tests.engine.gpu_engines import open_engine
from tests.engine.toy import Graph, toy_inputs

GIB = 2**30


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(EngineError, match=f"backend {name} needs the package {package}.*: pip install {package}"):
            load_tensorrt(name)


def test_a_file_is_compared_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "toy.engine").write_bytes(b"engine")
    file = GraphFile.of(tmp_path, "toy.engine")
    with checked_file("toy", tmp_path, file) as content:
        assert bytes(content) == b"engine"
    (tmp_path / "toy.engine").write_bytes(b"enginf")
    refused = pytest.raises(EngineError, match=r"Engine toy: .*toy\.engine must have SHA-256 .*: it was damaged")
    with refused, checked_file("toy", tmp_path, file):
        pytest.fail("it was opened")


@pytest.mark.parametrize("content", [None, b""])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "toy.engine").write_bytes(content)
    refused = pytest.raises(EngineError, match=r"Engine toy: .*toy\.engine must be a file of 6 bytes")
    with refused, checked_file("toy", tmp_path, GraphFile("toy.engine", 6, "0" * 64)):
        pytest.fail("it was opened")


def test_weights_that_fit() -> None:
    require_room({"a": 3 * GIB, "b": GIB}, 4 * GIB)


@pytest.mark.parametrize("available", [2 * GIB, -1])
def test_weights_that_do_not_fit(available: int) -> None:
    with pytest.raises(MemoryShortage, match=r"The engines need 4\.0 GiB for their weights, [02]\.0 GiB are free"):
        require_room({"a": 3 * GIB, "b": GIB}, available)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_engines_share_scratch_memory_that_grows(toy: Graph, backend: str) -> None:
    memory = ActivationMemory(torch.device("cuda", torch.cuda.current_device()))
    memory.reserve(1000)
    before = memory.pointer
    memory.reserve(999)
    assert memory.pointer == before
    memory.reserve(10_000)
    assert memory.pointer % 256 == 0
    assert memory.size_bytes == 10_000
    with open_engine(toy, backend) as first, open_engine(toy, backend) as second:
        inputs = {name: tensor.cuda() for name, tensor in toy_inputs(4, 3).items()}
        for name, output in first(**inputs).items():
            assert torch.equal(output, second(**inputs)[name])
