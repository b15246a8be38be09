"""How a kernel's result is judged, and how a deliberate fault is planted in a kernel."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

POISON = float("nan")


def assert_no_worse(
    result: Tensor, torch_result: Tensor, exact: Tensor, what: str, dtype: torch.dtype | None = None
) -> None:
    """The kernel may err at most twice as much as torch's own operations in the same precision.

    exact         the formula in fp64 on the same inputs
    torch_result  torch's operations in the working precision
    dtype         what the result was rounded to, where it has been widened since
    Both the largest and the root-mean-square error are held to that, relative to fp64. Where torch happens to be
    exact (one element, say), half a unit in the last place of the output type is allowed.
    """
    assert result.shape == exact.shape == torch_result.shape, f"{what}: {result.shape} instead of {exact.shape}"
    assert torch.isfinite(result.double()).all(), f"{what}: not finite, so part of the output was never written"
    error, own = (result.double() - exact).abs(), (torch_result.double() - exact).abs()
    half_unit = torch.finfo(dtype or result.dtype).eps / 2
    worst = 2 * own.max() + half_unit * exact.abs().max()
    assert error.max() <= worst, f"{what}: error {error.max():.3e}, allowed {worst:.3e}"
    mean = 2 * own.square().mean().sqrt() + half_unit / 8 * exact.square().mean().sqrt()
    rms = error.square().mean().sqrt()
    assert rms <= mean, f"{what}: RMS error {rms:.3e}, allowed {mean:.3e}"


def mutated(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A fresh copy of a kernel module in which the text `old`, which must occur exactly once, is `new`."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
    path = folder / "mutated_kernel.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_mutated", path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output that is wrong wherever the kernel forgets to write."""
    return torch.full(shape, POISON, dtype=torch.float32).to(dtype)
