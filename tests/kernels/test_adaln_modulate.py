"""adaln_modulate: the kernel in the interpreter, against the formula in fp64 and torch's own error."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stepvideo_kernels.adaln_modulate import kernel, op, reference, spec
from stepvideo_kernels.kernel_spec import TileConfig
from stepvideo_serve.dit.blocks import modulate
from tests.kernels.comparison import assert_no_worse, mutated, poisoned

TILE = TileConfig(4, 0, 4, 1)
EPS = 1e-5


class Case:
    """A residual stream of a given size, with an offset that a careless variance would lose digits to."""

    def __init__(
        self, tokens: int, width: int, dtype: torch.dtype, magnitude: float = 1.0, batch: int = 2, offset: float = 2.0
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * tokens + width)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.x = (magnitude * (random(batch, tokens, width) + offset)).to(dtype)
        self.branch = (magnitude * random(batch, tokens, width)).to(dtype)
        self.gate, self.scale, self.shift = (0.5 * random(3, batch, width)).to(dtype)
        self.weight, self.bias = (1 + 0.2 * random(width)).to(dtype), (0.1 * random(width)).to(dtype)
        self.out_scale = torch.tensor([0.02])

    def operands(self, *, residual: bool, wide: bool = False) -> list[Tensor]:
        tensors = [self.x, *([self.branch, self.gate] if residual else [])]
        tensors += [self.weight, self.bias, self.scale, self.shift]
        return [tensor.double() if wide else tensor for tensor in tensors]

    def exact(self) -> tuple[Tensor, Tensor]:
        return reference.adaln_residual(*self.operands(residual=True, wide=True), eps=EPS)

    def exact_plain(self) -> Tensor:
        return reference.adaln_modulate(*self.operands(residual=False, wide=True), eps=EPS)

    def torch_steps(self) -> tuple[Tensor, Tensor]:
        """As the unfused block computes it: rounded after each operation."""
        total = self.x + self.gate[:, None] * self.branch
        return total, self._modulated(total)

    def torch_plain(self) -> Tensor:
        return self._modulated(self.x)

    def _modulated(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, EPS)
        return modulate(normed, self.scale[:, None], self.shift[:, None])

    def run(self, written: torch.dtype, module: ModuleType = kernel, tile: TileConfig = TILE) -> tuple[Tensor, Tensor]:
        total = poisoned(*self.x.shape, dtype=self.x.dtype)
        return total, self._launch((self.branch, self.gate), total, written, module, tile)

    def run_plain(self, written: torch.dtype, module: ModuleType = kernel, tile: TileConfig = TILE) -> Tensor:
        return self._launch(None, None, written, module, tile)

    def _launch(
        self,
        residual: tuple[Tensor, Tensor] | None,
        total: Tensor | None,
        written: torch.dtype,
        module: ModuleType,
        tile: TileConfig,
    ) -> Tensor:
        y = poisoned(*self.x.shape, dtype=written)
        out_scale = self.out_scale if written == torch.float8_e4m3fn else None
        affine, modulation = (self.weight, self.bias), (self.scale, self.shift)
        module.launch(self.x, residual, affine, modulation, out_scale, (total, y), EPS, tile)
        return y


def check(case: Case, module: ModuleType = kernel, tile: TileConfig = TILE) -> None:
    """Both forms, in the type of x."""
    dtype = case.x.dtype
    results = case.run(dtype, module, tile)
    for name, result, step, truth in zip(("x'", "y"), results, case.torch_steps(), case.exact(), strict=True):
        assert_no_worse(result, step, truth, what=f"{name} with residual")
    assert_no_worse(case.run_plain(dtype, module, tile), case.torch_plain(), case.exact_plain(), what="y")


def check_fp8(case: Case, module: ModuleType = kernel, tile: TileConfig = TILE) -> None:
    """Both forms, y in units of its scale."""
    fp8 = torch.float8_e4m3fn
    total, y = case.run(fp8, module, tile)
    torch_total, torch_y = case.torch_steps()
    exact_total, exact_y = case.exact()
    assert_no_worse(total, torch_total, exact_total, what="x'")
    _check_scaled(case, y, torch_y, exact_y)
    _check_scaled(case, case.run_plain(fp8, module, tile), case.torch_plain(), case.exact_plain())


def _check_scaled(case: Case, y: Tensor, torch_y: Tensor, exact: Tensor) -> None:
    wanted = (exact / case.out_scale.double()).clamp(-448, 448)
    by_torch = reference.to_fp8(torch_y, case.out_scale)
    assert_no_worse(y.float(), by_torch.float(), wanted, "y in FP8", by_torch.dtype)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_length_of_a_tile(tokens: int, dtype: torch.dtype) -> None:
    check(Case(tokens, width=256, dtype=dtype))


@pytest.mark.parametrize("width", [16, 128, 272, 6144])
def test_widths(width: int) -> None:
    check(Case(5, width, dtype=torch.bfloat16))
    check_fp8(Case(5, width, dtype=torch.bfloat16))


@pytest.mark.parametrize("magnitude", [0.02, 1.0, 30.0])
def test_size_of_activations(magnitude: float) -> None:
    check(Case(7, width=256, dtype=torch.bfloat16, magnitude=magnitude))
    check_fp8(Case(7, width=256, dtype=torch.bfloat16, magnitude=magnitude))


def test_variance_is_taken_about_the_mean() -> None:
    check(Case(3, width=512, dtype=torch.float32, offset=300.0))


def test_values_beyond_the_range_of_fp8_are_clamped() -> None:
    case = Case(3, width=128, dtype=torch.bfloat16)
    case.out_scale = torch.tensor([1e-3])
    assert case.run_plain(torch.float8_e4m3fn).float().abs().max() == 448
    check_fp8(case)


@pytest.mark.parametrize("variant", ["residual-bf16", "residual-fp8"])
def test_tiles_of_production_give_the_same(variant: str) -> None:
    case = Case(37, width=64, dtype=torch.bfloat16)
    written = torch.float8_e4m3fn if variant.endswith("fp8") else torch.bfloat16
    expected = case.run(written)
    for tile in spec.TILES[variant][90]:
        for got, want in zip(case.run(written, tile=tile), expected, strict=True):
            assert torch.equal(got.float(), want.float())


FAULTS = {
    "last row of a tile not written": (
        "first_row + ROWS_PER_PROGRAM, tokens)",
        "first_row + ROWS_PER_PROGRAM, tokens - 1)",
    ),
    "scale without the one": ("amplify = 1.0 + tl.load", "amplify = tl.load"),
    "bias not modulated": ("offset = amplify * tl.load", "offset = tl.load"),
    "modulation of the first batch entry for all": ("vector = batch * WIDTH + columns", "vector = columns"),
    "mean over the padded width": ("tl.sum(x, axis=0) / WIDTH", "tl.sum(x, axis=0) / BLOCK_D"),
    "variance over the padded width": ("(centred * centred, axis=0) / WIDTH", "(centred * centred, axis=0) / BLOCK_D"),
    "padding counted in the variance": ("tl.where(inside, x - tl.sum", "tl.where(columns >= 0, x - tl.sum"),
    "gate ignored": ("x += gate * tl.load", "x += tl.load"),
    "eps of another norm": ("/ WIDTH + eps)", "/ WIDTH + 1e-2)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, tmp_path: Path) -> None:
    faulty = mutated(kernel, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check(Case(9, width=144, dtype=torch.bfloat16, magnitude=0.2), faulty)


def test_fault_of_fp8_is_caught(tmp_path: Path) -> None:
    faulty = mutated(kernel, "unit = 1.0 / tl.load(out_scale_ptr)", "unit = tl.load(out_scale_ptr)", tmp_path)
    with pytest.raises(AssertionError):
        check_fp8(Case(5, width=144, dtype=torch.bfloat16), faulty)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("scaled", [False, True], ids=["bf16", "fp8"])
def test_operator_is_a_proper_one(residual: bool, scaled: bool) -> None:
    case = Case(5, width=64, dtype=torch.bfloat16)
    forms = (op.adaln_modulate, op.adaln_modulate_fp8), (op.adaln_residual, op.adaln_residual_fp8)
    extra = [case.out_scale] if scaled else []
    torch.library.opcheck(forms[residual][scaled], (*case.operands(residual=residual), *extra))
