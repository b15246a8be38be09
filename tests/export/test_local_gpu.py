"""Which GPU engines of `tensorrt` are built for: asked of a driver that is played here, as cuda.bindings answers."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from export.engines.gpus import build_slots
from stepvideo_serve.errors import ExportError

OK, NO_DEVICE = 0, 100  # CUresult
MAJOR, MINOR = 75, 76  # CUdevice_attribute


def driver(monkeypatch: pytest.MonkeyPatch, status: int, capability: tuple[int, int] = (9, 0)) -> None:
    """A driver that begins with this status; torch cannot be imported."""
    attributes = dict(zip((MAJOR, MINOR), capability, strict=True))
    names = ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR")
    bindings = ModuleType("cuda.bindings")
    bindings.driver = SimpleNamespace(  # type: ignore[attr-defined]
        CUdevice_attribute=SimpleNamespace(**dict(zip(names, (MAJOR, MINOR), strict=True))),
        cuInit=lambda _flags: (status,),
        cuDeviceGetCount=lambda: (OK, 1),
        cuDeviceGet=lambda index: (OK, f"device {index}"),
        cuDeviceGetName=lambda length, _device: (OK, b"NVIDIA B300".ljust(length, b"\0")),
        cuDeviceGetAttribute=lambda name, _device: (OK, attributes[name]),
    )
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "torch", None)


def test_the_gpu_is_found_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, OK, (10, 3))
    assert [slot.gpu for slot in build_slots("tensorrt", 103, 1)] == ["NVIDIA B300"]
    with pytest.raises(ExportError, match=r"builds for the GPU of this machine, SM 103, got --sm 90"):
        build_slots("tensorrt", 90, 1)


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, NO_DEVICE)
    with pytest.raises(ExportError, match="tensorrt builds on a GPU, found none: build on the machine that serves"):
        build_slots("tensorrt", 90, 1)


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ExportError, match=r"by the package cuda-bindings, found none .* 'stepvideo-serve\[gpu\]'"):
        build_slots("tensorrt", 90, 1)


def test_tensorrt_rtx_asks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert [slot.environment for slot in build_slots("tensorrt_rtx", 89, 2)] == [{}, {}]
