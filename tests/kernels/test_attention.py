"""attention in bf16 and fp16: the kernel in the interpreter, against fp64 and torch."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stepvideo_kernels.attention import kernel, op, reference, spec
from stepvideo_kernels.kernel_spec import TileConfig
from stepvideo_serve.dit.blocks import attend
from tests.kernels.comparison import assert_no_worse, mutated, poisoned

POINTERS = TileConfig(16, 16, 4, 1, extra={"TMA": False, "FRESH": False, "AHEAD": False})
MAPS = TileConfig(16, 16, 4, 1, extra={"TMA": True, "FRESH": False, "AHEAD": False})
SPECIALIZED = TileConfig(16, 16, 4, 1, warp_specialize=True, extra={"TMA": True, "FRESH": False, "AHEAD": False})
AHEAD = TileConfig(16, 16, 4, 1, extra={"TMA": True, "FRESH": False, "AHEAD": True})
TILES = {"pointers": POINTERS, "tensor maps": MAPS, "specialised": SPECIALIZED, "ahead": AHEAD}


class Case:
    """Random operands."""

    def __init__(
        self,
        queries: int,
        keys: int,
        heads: int = 2,
        dtype: torch.dtype = torch.bfloat16,
        magnitude: float = 1.0,
        batch: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * queries + keys)
        shapes = [(batch, heads, tokens, spec.HEAD_DIM) for tokens in (queries, keys, keys)]
        operands = [magnitude * torch.randn(shape, generator=generator) for shape in shapes]
        self.q, self.k, self.v = (x.to(dtype) for x in operands)
        self.v += 0.5 * magnitude

    def formula(self, convert: Callable[[Tensor], Tensor]) -> Tensor:
        return reference.attention(convert(self.q), convert(self.k), convert(self.v))

    def kernel(self, tile: TileConfig, module: ModuleType = kernel) -> Tensor:
        batch, heads, queries, width = self.q.shape
        out = poisoned(batch, queries, heads * width, dtype=self.q.dtype)
        module.launch(self.q, self.k, self.v, out, tile)
        return out


def check(case: Case, tile: TileConfig = POINTERS, module: ModuleType = kernel) -> Tensor:
    result = case.kernel(tile, module)
    assert_no_worse(result, case.formula(lambda x: x), case.formula(Tensor.double), "attention")
    return result


@pytest.mark.parametrize("keys", [1, 13, 15, 16, 17, 37])
@pytest.mark.parametrize("tile", TILES)
def test_every_number_of_keys_in_a_tile(keys: int, tile: str) -> None:
    check(Case(19, keys), TILES[tile])


@pytest.mark.parametrize("queries", [1, 13, 15, 16, 17, 37])
@pytest.mark.parametrize("tile", TILES)
def test_every_number_of_queries_in_a_tile(queries: int, tile: str) -> None:
    check(Case(queries, 23, dtype=torch.float16), TILES[tile])


@pytest.mark.parametrize("magnitude", [0.02, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_size_of_activations(magnitude: float, dtype: torch.dtype) -> None:
    check(Case(17, 150, dtype=dtype, magnitude=magnitude), MAPS)


def test_all_48_heads_and_two_batch_entries() -> None:
    check(Case(17, 18, heads=48, batch=2), TileConfig(32, 32, 4, 1, extra=MAPS.extra))


def test_scores_that_grow_and_shrink_along_the_keys() -> None:
    """The running maximum changes in every tile in one head and never in the other."""
    case = Case(9, 64)
    ramp = torch.linspace(0.2, 8, 64)[:, None]
    case.k[:, 0] = case.q[:, 0, :1] * ramp
    case.k[:, 1] = case.q[:, 1, :1] * ramp.flip(0)
    check(case)
    check(case, SPECIALIZED)
    check(case, AHEAD)


def test_text_of_production_at_397_keys() -> None:
    check(Case(33, 397, heads=1, batch=2), spec.tile("bf16", 90))


@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_tiles_of_production(sm: int) -> None:
    for tile in spec.TILES["bf16"][sm]:
        check(Case(tile.block_m + 1, 2 * tile.block_n + 3, heads=1), tile)


def test_reference_is_what_the_block_computes() -> None:
    case = Case(7, 9, dtype=torch.float32, batch=2)
    assert torch.equal(reference.attention(case.q, case.k, case.v), attend(case.q, case.k, case.v))


FAULTS = {
    "last key left out": ("+ tl.arange(0, BLOCK_N) < end", "+ tl.arange(0, BLOCK_N) < end - 1"),
    "keys behind the last count": ("+ tl.arange(0, BLOCK_N) < end", "+ tl.arange(0, BLOCK_N) < end + 1"),
    "accumulator not rescaled": ("v_tile, acc * rescale[:, None], INTERPRET", "v_tile, acc, INTERPRET"),
    "last tile skipped": ("whole, keys, to_log2, row_max", "whole, whole, to_log2, row_max"),
    "first tile skipped": ("padded, 0, whole, to_log2", "padded, BLOCK_N, whole, to_log2"),
    "running maximum forgotten": ("row_max, row_sum, to_log2, SHIFT if", "row_max - 1, row_sum, to_log2, SHIFT if"),
    "not divided by the sum": ("(acc * inverse[:, None])", "acc"),
    "last query not written": ("mask=rows[:, None] < queries)", "mask=rows[:, None] < queries - 1)"),
    "out laid out by heads": ("offsets = row_offsets[:, None] + head * HEAD", "offsets = row_offsets[:, None]"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with infinities
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, tmp_path: Path) -> None:
    faulty = mutated(kernel, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check(Case(21, 53), module=faulty)


AHEAD_FAULTS = {
    "scores of the same tile again": ("start + BLOCK_N, end, BLOCK_N, TMA, False", "start, end, BLOCK_N, TMA, False"),
    "scores not handed on": ("scores = next_scores", "scores = scores"),
    "values of the first tile at the end": ("padded, end - BLOCK_N, to_log2", "padded, 0, to_log2"),
    "last whole tile skipped": ("tl.range(0, end - BLOCK_N, BLOCK_N)", "tl.range(0, end - 2 * BLOCK_N, BLOCK_N)"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", AHEAD_FAULTS)
def test_faults_of_looking_ahead_are_caught(fault: str, tmp_path: Path) -> None:
    faulty = mutated(kernel, *AHEAD_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check(Case(21, 53), AHEAD, faulty)


def test_operator_is_a_proper_one() -> None:
    case = Case(5, 7, batch=2)
    torch.library.opcheck(op.attention, (case.q, case.k, case.v))


def test_specification_refuses_with_the_reason() -> None:
    assert spec.SPEC.refuse(dtype="bf16", output="bf16", size=128, sm=80, tokens=37_944) is None
    refusal = spec.SPEC.refuse(dtype="bf16", output="bf16", size=64, sm=90)
    assert refusal == "attention takes a head size of 128, got 64: use the reference for it."
    refusal = spec.SPEC.refuse(dtype="fp8", output="bf16", size=128, sm=80)
    assert refusal == "attention takes fp8 from SM 89 on, got SM 80: use another type."
