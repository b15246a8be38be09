"""attention in FP8: the kernel in the interpreter, against fp64 and the same roundings in torch."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stepvideo_kernels.attention import kernel, op, reference, spec
from stepvideo_kernels.kernel_spec import TileConfig
from tests.kernels.comparison import assert_no_worse, mutated, poisoned

POINTERS = TileConfig(16, 16, 4, 1, extra={"TMA": False, "FRESH": True, "AHEAD": False})
MAPS = TileConfig(16, 16, 4, 1, extra={"TMA": True, "FRESH": False, "AHEAD": False})
SPECIALIZED = TileConfig(16, 16, 4, 1, warp_specialize=True, extra={"TMA": True, "FRESH": True, "AHEAD": False})
TILES = {"pointers": POINTERS, "tensor maps": MAPS, "specialised": SPECIALIZED}
FP8 = torch.float8_e4m3fn


class Case:
    """Random activations in E4M3 with a scale for each head; unused columns of v hold a large value."""

    def __init__(self, queries: int, keys: int, heads: int = 2, magnitude: float = 1.0, batch: int = 1) -> None:
        generator = torch.Generator().manual_seed(1000 * queries + keys)
        shapes = [(batch, heads, tokens, spec.HEAD_DIM) for tokens in (queries, keys, keys)]
        operands = [magnitude * torch.randn(shape, generator=generator) for shape in shapes]
        operands[2] += 0.5 * magnitude
        spread = torch.linspace(1.0, 1.6, heads)
        self.scales = tuple(spread * factor * magnitude / 100 for factor in (1.0, 0.9, 1.2))
        q, k, v = ((x / s.view(-1, 1, 1)).to(FP8) for x, s in zip(operands, self.scales, strict=True))
        padding = torch.full((batch, heads, spec.HEAD_DIM, spec.padded_keys(keys) - keys), 448.0).to(FP8)
        turned = torch.cat((v.float().transpose(2, 3), padding.float()), -1).to(FP8)
        self.q, self.k, self.v = q, k, turned

    def exact(self) -> Tensor:
        """The formula in fp64 on the values that the operands stand for."""
        v = self.v[..., : self.k.shape[2]].transpose(2, 3)
        operands = zip((self.q, self.k, v), self.scales, strict=True)
        return reference.attention(*(x.double() * scale.double().view(-1, 1, 1) for x, scale in operands))

    def kernel(self, tile: TileConfig, module: ModuleType = kernel) -> Tensor:
        batch, heads, queries, width = self.q.shape
        out = poisoned(batch, queries, heads * width, dtype=torch.bfloat16)
        module.launch(self.q, self.k, self.v, out, tile, scales=self.scales)
        return out


def check(case: Case, tile: TileConfig = POINTERS, module: ModuleType = kernel) -> None:
    by_torch = reference.attention_fp8(case.q, case.k, case.v, *case.scales)
    assert_no_worse(case.kernel(tile, module), by_torch, case.exact(), "FP8 attention")


@pytest.mark.parametrize("keys", [1, 13, 15, 16, 17, 37])
@pytest.mark.parametrize("tile", TILES)
def test_every_number_of_keys_in_a_tile(keys: int, tile: str) -> None:
    check(Case(19, keys), TILES[tile])


@pytest.mark.parametrize("queries", [1, 13, 15, 16, 17, 37])
def test_every_number_of_queries_in_a_tile(queries: int) -> None:
    check(Case(queries, 23), MAPS)


@pytest.mark.parametrize("magnitude", [0.02, 1.0, 30.0])
@pytest.mark.parametrize("tile", TILES)
def test_size_of_activations(magnitude: float, tile: str) -> None:
    check(Case(17, 150, magnitude=magnitude), TILES[tile])


def test_all_48_heads_and_two_batch_entries() -> None:
    check(Case(17, 18, heads=48, batch=2), TileConfig(32, 32, 4, 1, extra=MAPS.extra))


@pytest.mark.parametrize("sm", [89, 90, 100])
def test_tiles_of_production(sm: int) -> None:
    for tile in spec.TILES["fp8"][sm]:
        check(Case(tile.block_m + 1, 2 * tile.block_n + 3, heads=1), tile)


FAULTS = {
    "q's scale left out": ("to_log2 *= tl.load(q_scale + head) * tl", "to_log2 *= tl"),
    "scale of another head": ("tl.load(k_scale + head)", "tl.load(k_scale)"),
    "v's scale left out": ("inverse *= tl.load(v_scale + head)", "inverse *= 1.0"),
    "weights beyond the range of E4M3": ("SHIFT = tl.constexpr(8)", "SHIFT = tl.constexpr(10)"),
    "accumulator not rescaled": ("acc = acc * rescale[:, None] + fresh_dot", "acc = acc + fresh_dot"),
    "v read as if it were not padded": (
        "tl.arange(0, HEAD)[:, None] * padded", "tl.arange(0, HEAD)[:, None] * (padded - 16)"
    ),
    "last key left out": ("+ tl.arange(0, BLOCK_N) < end", "+ tl.arange(0, BLOCK_N) < end - 1"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with infinities
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, tmp_path: Path) -> None:
    faulty = mutated(kernel, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check(Case(21, 85, magnitude=2.0), module=faulty)


def one_key_above_the_rest() -> Case:
    """One key of weight 1 and 84 of about 2^-11, which E4M3 holds only when they are scaled up before."""
    case = Case(5, 85, heads=1)
    units = [1 / scale.item() for scale in case.scales]
    case.q = torch.full(case.q.shape, units[0]).to(FP8)
    case.k = (0.02 * torch.randn(case.k.shape, generator=torch.Generator().manual_seed(0)) * units[1]).to(FP8)
    case.k[:, :, 3] = torch.tensor(0.7 * units[1]).to(FP8)
    return case


def test_small_weights_are_kept() -> None:
    for tile in TILES.values():
        check(one_key_above_the_rest(), tile)


def test_weights_not_scaled_into_the_range_of_e4m3_are_caught(tmp_path: Path) -> None:
    faulty = mutated(kernel, "SHIFT = tl.constexpr(8)", "SHIFT = tl.constexpr(0)", tmp_path)
    with pytest.raises(AssertionError):
        check(one_key_above_the_rest(), module=faulty)


def test_operator_is_a_proper_one() -> None:
    case = Case(5, 7, batch=2)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operands = (case.q, case.k, case.v, *case.scales)
    torch.library.opcheck(op.attention_fp8, operands, test_utils=checks)  # test_schema cannot compare FP8 tensors
