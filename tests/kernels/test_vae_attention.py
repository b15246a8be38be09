"""vae_attention: the kernel in the interpreter, against the formula in fp64 and torch's own error."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stepvideo_kernels.kernel_spec import Constant, FullSize, TileConfig
from stepvideo_kernels.vae_attention import kernel, op, reference, spec
from stepvideo_serve.vae.layers import TokenCausalAttention
from tests.kernels.comparison import assert_no_worse, mutated, poisoned

HELD: dict[str, Constant] = {"VALUES": 32, "CHUNK": 32, "TMA": True, "STREAM_Q": False}
STREAMED: dict[str, Constant] = {"VALUES": 64, "CHUNK": 32, "TMA": False, "STREAM_Q": True}
POINTERS = TileConfig(16, 16, 4, 1, extra=STREAMED)
MAPS = TileConfig(16, 16, 4, 1, extra=HELD)
TILES = {
    "q streamed by pointers": POINTERS,
    "q streamed by tensor maps": TileConfig(16, 16, 4, 1, extra={**STREAMED, "TMA": True}),
    "q held by tensor maps": MAPS,
    "q held by pointers": TileConfig(16, 16, 4, 1, extra={**HELD, "TMA": False}),
}


class Case:
    """Random q, k and v."""

    def __init__(
        self,
        tokens: int,
        width: int = 96,
        dtype: torch.dtype = torch.bfloat16,
        magnitude: float = 1.0,
        batch: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * tokens + width)
        values = magnitude * torch.randn(3, batch, tokens, width, generator=generator)
        self.operands: tuple[Tensor, Tensor, Tensor] = tuple(x.contiguous() for x in values.to(dtype))

    def exact(self) -> Tensor:
        return reference.vae_attention(*(x.double() for x in self.operands))

    def kernel(self, tile: TileConfig, module: ModuleType = kernel) -> Tensor:
        out = poisoned(*self.operands[0].shape, dtype=self.operands[0].dtype)
        module.launch(*self.operands, out, tile)
        return out


def check(case: Case, tile: TileConfig = POINTERS, module: ModuleType = kernel) -> None:
    by_torch = reference.vae_attention(*case.operands)
    assert_no_worse(case.kernel(tile, module), by_torch, case.exact(), "vae_attention")


@pytest.mark.parametrize("tokens", [1, 13, 15, 16, 17, 37])
@pytest.mark.parametrize("tile", TILES)
def test_every_length_of_a_tile(tokens: int, tile: str) -> None:
    check(Case(tokens), TILES[tile])


@pytest.mark.parametrize("width", [32, 64, 160, 352, 480, 512])
@pytest.mark.parametrize("sm", [80, 90])
def test_multiples_of_32_channels(width: int, sm: int) -> None:
    """With the values and chunks of production, in small tiles."""
    extra = spec.tile("fp16", sm).extra
    check(Case(21, width, dtype=torch.float16), TileConfig(16, 16, 4, 1, extra=extra))


@pytest.mark.parametrize("magnitude", [0.02, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_size_of_activations(magnitude: float, dtype: torch.dtype) -> None:
    check(Case(70, 128, dtype, magnitude), MAPS)


def test_batch_entries_do_not_mix() -> None:
    for tile in TILES.values():
        check(Case(19, 64, batch=3), tile)


def test_tiles_of_unequal_sides() -> None:
    for m, n in ((32, 16), (16, 32)):
        check(Case(53), TileConfig(m, n, 4, 1, extra=HELD))


@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_tiles_of_production_at_512_channels(sm: int) -> None:
    tile = spec.tile("bf16", sm)
    check(Case(tile.block_m + 3, 512), tile)


def test_reference_is_what_the_layer_computes() -> None:
    torch.manual_seed(0)
    layer, x = TokenCausalAttention(64), torch.randn(2, 64, 2, 3, 4)
    with torch.no_grad():
        h = layer.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2) for project in (layer.q, layer.k, layer.v))
        out = reference.vae_attention(q, k, v).transpose(1, 2).unflatten(2, (2, 3, 4))
        torch.testing.assert_close(x + layer.proj_out(out), layer(x))


def test_every_query_is_covered_once_and_memory_is_only_the_output() -> None:
    """The grid of the full size: programs along tokens and values tile the output exactly, with no partial results."""
    full = FullSize()
    for sm in spec.TILES["bf16"]:
        tile = spec.tile("bf16", sm)
        rows, parts, batch = spec.grid(1, full.vae_tokens, full.vae_channels, tile)
        values = int(spec.constexprs(tile, full.vae_channels)["VALUES"])
        assert (rows - 1) * tile.block_m < full.vae_tokens <= rows * tile.block_m
        assert (parts * values, batch) == (full.vae_channels, 1)


FAULTS = {
    "a token does not see itself": ("columns[None, :] <= rows[:, None]", "columns[None, :] < rows[:, None]"),
    "a token sees the next one": ("columns[None, :] <= rows[:, None]", "columns[None, :] <= rows[:, None] + 1"),
    "diagonal not masked": ("if start_n + BLOCK_N > start_m:", "if start_n + BLOCK_N > tokens:"),
    "last tile of keys left out": ("tl.minimum(start_m + BLOCK_M, tokens)", "start_m"),
    "accumulator not rescaled": ("acc * rescale[:, None], INTERPRET", "acc, INTERPRET"),
    "one chunk of channels left out": ("tl.range(0, WIDTH, CHUNK)", "tl.range(CHUNK, WIDTH, CHUNK)"),
    "parts of the values swapped": ("column = tl.program_id(1) * VALUES", "column = 0"),
    "last query not written": ("(rows[:, None] < tokens) & (channels", "(rows[:, None] < tokens - 1) & (channels"),
    "batch entries mixed": ("base = tensor + batch.to(tl.int64)", "base = tensor + 0"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with infinities
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, tmp_path: Path) -> None:
    faulty = mutated(kernel, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check(Case(37, batch=2), module=faulty)


def test_operator_is_a_proper_one() -> None:
    torch.library.opcheck(op.vae_attention, Case(5, batch=2).operands)


def test_specification_refuses_with_the_reason() -> None:
    assert spec.SPEC.refuse(dtype="bf16", output="bf16", size=512, sm=90, tokens=42_160) is None
    refusal = spec.SPEC.refuse(dtype="bf16", output="bf16", size=48, sm=90)
    assert refusal == "vae_attention takes a head size of a multiple of 32 up to 512, got 48: use the reference for it."
