"""The TensorRT runners up to the driver."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepvideo_serve.engine.manifest import GraphFile
from stepvideo_serve.engine.nvinfer import (
    PACKAGES,
    ActivationMemory,
    checked_file,
    load_tensorrt,
    may_capture,
    weight_budgets,
)
from stepvideo_serve.engine.spec import Dim
from stepvideo_serve.errors import EngineError
from tests.engine.gpu_engines import open_engine
from tests.engine.toy import SPEC, Graph, toy_inputs

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


def test_weights_that_fit_stay_on_the_gpu() -> None:
    assert weight_budgets({"a": 3 * GIB, "b": GIB}, 4 * GIB, streamable=False) == {"a": None, "b": None}


def test_weights_that_do_not_fit_are_streamed_in_equal_shares() -> None:
    budgets = weight_budgets({"a": 3 * GIB, "b": GIB}, 2 * GIB, streamable=True)
    assert budgets == {"a": 3 * GIB // 2, "b": GIB // 2}


@pytest.mark.parametrize(("available", "streamable"), [(2 * GIB, False), (-1, True)])
def test_weights_that_cannot_fit(available: int, streamable: bool) -> None:
    with pytest.raises(EngineError, match=r"The engines need 4\.0 GiB for their weights, [02]\.0 GiB are free"):
        weight_budgets({"a": 3 * GIB, "b": GIB}, available, streamable)


def test_only_small_engines_of_one_size_are_captured() -> None:
    fixed = replace(SPEC, dims={"rows": Dim(4, 4, 4), "columns": Dim(3, 3, 3)})
    assert may_capture(fixed)
    assert not may_capture(SPEC)
    assert not may_capture(replace(fixed, dims={"rows": Dim(10**6, 10**6, 10**6), "columns": Dim(3, 3, 3)}))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_a_captured_engine_gives_what_it_gives_uncaptured(toy: Graph, backend: str) -> None:
    fixed = Graph(replace(SPEC, dims={"rows": Dim(4, 4, 4), "columns": Dim(3, 3, 3)}), toy.module, toy.onnx_path)
    with open_engine(fixed, backend) as plain, open_engine(fixed, backend, capture=True) as captured:
        for seed in range(3):
            inputs = {name: tensor.cuda() for name, tensor in toy_inputs(4, 3, seed).items()}
            expected = plain(**inputs)
            for name, output in captured(**inputs).items():
                assert torch.equal(output, expected[name])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_engines_share_scratch_memory_that_grows(toy: Graph, backend: str) -> None:
    memory = ActivationMemory(torch.device("cuda", torch.cuda.current_device()))
    memory.reserve(1000)
    before = memory.generation
    memory.reserve(999)
    assert memory.generation == before
    memory.reserve(10_000)
    assert memory.generation == before + 1
    assert memory.pointer % 256 == 0
    assert memory.size_bytes == 10_000
    with open_engine(toy, backend) as first, open_engine(toy, backend) as second:
        inputs = {name: tensor.cuda() for name, tensor in toy_inputs(4, 3).items()}
        for name, output in first(**inputs).items():
            assert torch.equal(output, second(**inputs)[name])
