"""Which GPU engines of `tensorrt` are built for: asked of a driver that is played here, as cuda.bindings answers."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from export.engines.toolkit import check_local_gpu
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
        cuDeviceGet=lambda index: (OK, f"device {index}"),
        cuDeviceGetAttribute=lambda name, _device: (OK, attributes[name]),
    )
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "torch", None)


def test_the_gpu_is_found_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, OK, (10, 3))
    check_local_gpu("tensorrt", 103)
    with pytest.raises(ExportError, match=r"builds for the GPU of this machine, SM 103, got --sm 90"):
        check_local_gpu("tensorrt", 90)


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, NO_DEVICE)
    with pytest.raises(ExportError, match="tensorrt builds on a GPU, found none: build on the machine that serves"):
        check_local_gpu("tensorrt", 90)


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ExportError, match=r"by the package cuda-bindings, found none .* 'stepvideo-serve\[gpu\]'"):
        check_local_gpu("tensorrt", 90)


def test_tensorrt_rtx_asks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    check_local_gpu("tensorrt_rtx", 89)
