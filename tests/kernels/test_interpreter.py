"""What the other tests rely on: the interpreter rounds like torch, and like a GPU."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, target, count, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    mask = index < count
    values = tl.load(source + index, mask=mask)
    tl.store(target + index, values.to(target.dtype.element_ty), mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("magnitude", [0.001, 1.0, 100.0])
def test_conversions_round_like_torch(dtype: torch.dtype, magnitude: float) -> None:
    values = (torch.randn(4096) * magnitude).clamp(-448, 448)
    values[:4] = torch.tensor([127.8, 0.99, 0.0, -31.9])
    there = torch.empty(values.shape, dtype=dtype)
    copy_kernel[(1,)](values, there, 4096, BLOCK=4096)
    assert torch.equal(there.float(), values.to(dtype).float())
    back = torch.empty(values.shape)
    copy_kernel[(1,)](there, back, 4096, BLOCK=4096)
    assert torch.equal(back, there.float())
