"""alibi_attention: the kernel in the interpreter, against the formula in fp64 and torch's own error."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stepvideo_kernels.alibi_attention import kernel, op, reference, spec
from stepvideo_kernels.kernel_spec import TileConfig
from stepvideo_serve.errors import EngineError
from stepvideo_serve.text import step_llm
from tests.kernels.comparison import assert_no_worse, mutated, poisoned

TILE = TileConfig(16, 16, 4, 1)


class Case:
    """Random projections; six heads over two groups have two slopes of the second series."""

    def __init__(
        self,
        tokens: int,
        heads: int = 6,
        groups: int = 2,
        dtype: torch.dtype = torch.bfloat16,
        magnitude: float = 1.0,
        batch: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * tokens + heads)
        width = (heads + 2 * groups) * spec.HEAD_DIM
        self.qkv = (magnitude * torch.randn(batch, tokens, width, generator=generator)).to(dtype)
        self.slopes = reference.alibi_slopes(heads)

    def exact(self) -> Tensor:
        return reference.alibi_attention(self.qkv.double(), self.slopes)

    def kernel(self, tile: TileConfig, module: ModuleType = kernel, slopes: Tensor | None = None) -> Tensor:
        batch, tokens, _ = self.qkv.shape
        out = poisoned(batch, tokens, len(self.slopes) * spec.HEAD_DIM, dtype=self.qkv.dtype)
        module.launch(self.qkv, self.slopes if slopes is None else slopes, out, tile)
        return out


def check(case: Case, tile: TileConfig = TILE, module: ModuleType = kernel, slopes: Tensor | None = None) -> None:
    by_torch = reference.alibi_attention(case.qkv, case.slopes)
    assert_no_worse(case.kernel(tile, module, slopes), by_torch, case.exact(), "alibi_attention")


@pytest.mark.parametrize("tokens", [1, 13, 15, 16, 17, 37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_length_of_a_tile(tokens: int, dtype: torch.dtype) -> None:
    check(Case(tokens, dtype=dtype))


@pytest.mark.parametrize("magnitude", [0.02, 1.0, 30.0])
def test_size_of_activations(magnitude: float) -> None:
    check(Case(70, heads=3, groups=1, magnitude=magnitude))


def test_all_48_heads_in_8_groups_and_two_batch_entries() -> None:
    check(Case(17, heads=48, groups=8, batch=2), TileConfig(32, 32, 4, 1))


def test_the_full_320_tokens() -> None:
    check(Case(320, heads=3, groups=1), spec.tile("bf16", 90))


@pytest.mark.parametrize("sm", [80, 90])
def test_tiles_of_production(sm: int) -> None:
    tile = spec.tile("bf16", sm)
    check(Case(tile.block_m + tile.block_n + 3, heads=3, groups=1), tile)


def test_tiles_of_unequal_sides() -> None:
    check(Case(53, heads=3, groups=1), TileConfig(32, 16, 4, 1))
    check(Case(53, heads=3, groups=1), TileConfig(16, 32, 4, 1))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 12, 48])
def test_slopes_are_those_of_the_model(heads: int) -> None:
    assert torch.equal(reference.alibi_slopes(heads), torch.tensor(step_llm.alibi_slopes(heads)))


def test_reference_is_what_the_model_computes() -> None:
    config = step_llm.StepLLMConfig(6 * spec.HEAD_DIM, 6, 2, 1, 256, 64, 1e-5)
    attention = step_llm.Attention(config)
    with torch.no_grad():
        attention.wqkv.weight.copy_(torch.randn(attention.wqkv.weight.shape) * config.width**-0.5)
        attention.wo.weight.copy_(torch.eye(config.width))
        x = torch.randn(2, 23, config.width)
        want = attention(x, step_llm.sqrt_alibi_bias(step_llm.alibi_slopes(6), 23, x.device))
        got = reference.alibi_attention(attention.wqkv(x), reference.alibi_slopes(6))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


FAULTS = {
    "wrong slopes for the extra heads": ("tl.load(slopes + head)", "tl.load(slopes + tl.minimum(head, 3))"),
    "bias grows with the distance, not its root": (
        "tl.sqrt(tl.maximum(distance, 0).to(tl.float32))", "tl.maximum(distance, 0).to(tl.float32)"
    ),
    "bias with the wrong sign": ("(scale * LOG2_E) - bias", "(scale * LOG2_E) + bias"),
    "bias in units of e": ("tl.load(slopes + head) * LOG2_E", "tl.load(slopes + head)"),
    "a token does not see itself": ("distance >= 0, scores", "distance >= 1, scores"),
    "a token sees the next one": ("distance >= 0, scores", "distance >= -1, scores"),
    "heads dealt out to groups in turn": ("head // (heads // groups)", "head % groups"),
    "v is k": ("pointers + HEAD, mask", "pointers, mask"),
    "accumulator not rescaled": ("acc * rescale[:, None], INTERPRET", "acc, INTERPRET"),
    "last tile of keys left out": ("tl.minimum(start_m + BLOCK_M, tokens)", "start_m"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with infinities
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, tmp_path: Path) -> None:
    faulty = mutated(kernel, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check(Case(37), module=faulty)


def test_the_plain_series_of_slopes_is_caught() -> None:
    """2^(-8 h / 6) for six heads: what one writes who forgets that six is no power of two."""
    with pytest.raises(AssertionError):
        check(Case(37), slopes=2.0 ** (-8 * torch.arange(1, 7) / 6))


def test_channels_that_do_not_fit_the_heads_are_refused() -> None:
    case = Case(5)
    with pytest.raises(EngineError, match="groups dividing the 5 heads, got 1280"):
        kernel.launch(case.qkv, case.slopes[:5], torch.empty(1, 5, 640), TILE)


def test_operator_is_a_proper_one() -> None:
    case = Case(5, batch=2)
    torch.library.opcheck(op.alibi_attention, (case.qkv, case.slopes))
