"""qkv_norm_rope: the kernel in the interpreter, against the formula in fp64 and torch's own error."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from stepvideo_kernels.kernel_spec import TileConfig
from stepvideo_kernels.qkv_norm_rope import kernel, op, reference, spec
from stepvideo_serve.dit.blocks import HeadNorm
from stepvideo_serve.dit.rope import apply_rope, rope_tables
from tests.kernels.comparison import assert_no_worse, mutated, poisoned

TILE = TileConfig(16, 0, 4, 1, extra={"HEADS_PER_PROGRAM": 2})
EPS = 1e-6


class Case:
    """Random operands: activations of a given size, gains around 1.5, positions along all three axes."""

    def __init__(self, tokens: int, heads: int, dtype: torch.dtype, magnitude: float = 1.0, batch: int = 1) -> None:
        generator = torch.Generator().manual_seed(1000 * tokens + heads)
        values = torch.randn(batch, tokens, 3 * spec.HEAD_DIM * heads, generator=generator)
        self.qkv = (magnitude * values).to(dtype)
        gains = 1.5 + 0.2 * torch.randn(2, spec.HEAD_DIM, generator=generator)
        self.q_gain, self.k_gain = gains.to(dtype)
        cos, sin = rope_tables(3, 7, -(-tokens // 21))
        self.tables = cos[:tokens].contiguous(), sin[:tokens].contiguous()
        self.scales = [size * torch.linspace(0.8, 1.2, heads) for size in (0.05, 0.07, magnitude / 90)]

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        gains = self.q_gain.double(), self.k_gain.double()
        return reference.qkv_norm_rope(self.qkv.double(), *gains, *(table.double() for table in self.tables), eps=EPS)

    def torch_steps(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the unfused model computes it: rounded after the norm and after the rotation."""
        q, k, v = self.qkv.unflatten(-1, (-1, 3 * spec.HEAD_DIM)).split(spec.HEAD_DIM, dim=-1)
        q, k = (apply_rope(_norm(x, gain), *self.tables) for x, gain in ((q, self.q_gain), (k, self.k_gain)))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def run(self, module: ModuleType = kernel, tile: TileConfig = TILE) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, width = self.qkv.shape
        shape = (batch, width // (3 * spec.HEAD_DIM), tokens, spec.HEAD_DIM)
        q, k, v = (poisoned(*shape, dtype=self.qkv.dtype) for _ in range(3))
        module.launch(self.qkv, (self.q_gain, self.k_gain), self.tables, None, (q, k, v), EPS, tile)
        return q, k, v

    def run_fp8(self, module: ModuleType = kernel, tile: TileConfig = TILE) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, width = self.qkv.shape
        rows = (batch, width // (3 * spec.HEAD_DIM), tokens, spec.HEAD_DIM)
        columns = (*rows[:2], spec.HEAD_DIM, spec.padded_tokens(tokens))
        q, k, v = (poisoned(*shape, dtype=torch.float8_e4m3fn) for shape in (rows, rows, columns))
        module.launch(self.qkv, (self.q_gain, self.k_gain), self.tables, self.scales, (q, k, v), EPS, tile)
        return q, k, v


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    norm = HeadNorm()
    norm.weight.data = gain
    with torch.no_grad():
        return norm.forward(x)


def check(case: Case, module: ModuleType = kernel, tile: TileConfig = TILE) -> None:
    for name, result, step, truth in zip("qkv", case.run(module, tile), case.torch_steps(), case.exact(), strict=True):
        assert_no_worse(result, step, truth, what=name)


def check_fp8(case: Case, module: ModuleType = kernel, tile: TileConfig = TILE) -> None:
    """In units of the scale; torch's own error is that of its steps, then divided, clamped and rounded to FP8."""
    results, torch_steps, exact = case.run_fp8(module, tile), case.torch_steps(), case.exact()
    tokens = case.qkv.shape[1]
    assert (results[2][..., tokens:].float() == 0).all(), "v is not padded with zeros"
    by_rows = (*results[:2], results[2][..., :tokens].transpose(2, 3))
    for name, result, step, truth, scale in zip("qkv", by_rows, torch_steps, exact, case.scales, strict=True):
        wanted = (truth / scale.double().view(-1, 1, 1)).clamp(-448, 448)
        by_torch = reference.to_fp8(step, scale)
        assert_no_worse(result.float(), by_torch.float(), wanted, f"{name} in FP8", by_torch.dtype)


@pytest.mark.parametrize("tokens", [1, 13, 15, 16, 17, 35])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_length_of_a_tile(tokens: int, dtype: torch.dtype) -> None:
    check(Case(tokens, heads=3, dtype=dtype))


@pytest.mark.parametrize("magnitude", [0.02, 1.0, 30.0])
def test_size_of_activations(magnitude: float) -> None:
    check(Case(17, heads=2, dtype=torch.bfloat16, magnitude=magnitude))
    check_fp8(Case(17, heads=2, dtype=torch.bfloat16, magnitude=magnitude))


@pytest.mark.parametrize("tokens", [1, 13, 15, 16, 17, 35])
def test_fp8_of_every_length_of_a_tile(tokens: int) -> None:
    check_fp8(Case(tokens, heads=3, dtype=torch.bfloat16))


def test_all_48_heads_and_two_batch_entries() -> None:
    case = Case(19, heads=48, dtype=torch.bfloat16, batch=2)
    tile = TileConfig(32, 0, 4, 1, extra={"HEADS_PER_PROGRAM": 16})
    check(case, tile=tile)
    check_fp8(case, tile=tile)


def test_values_beyond_the_range_of_fp8_are_clamped() -> None:
    case = Case(5, heads=1, dtype=torch.bfloat16)
    case.scales = [torch.tensor([1e-3])] * 3
    assert max(result.float().abs().max() for result in case.run_fp8()) == 448
    check_fp8(case)


@pytest.mark.parametrize("variant", ["bf16", "fp8"])
def test_tiles_of_production_give_the_same(variant: str) -> None:
    case = Case(37, heads=3, dtype=torch.bfloat16)
    run = case.run_fp8 if variant == "fp8" else case.run
    expected = run()
    for tile in spec.TILES[variant][90]:
        for got, want in zip(run(tile=tile), expected, strict=True):
            assert torch.equal(got.float(), want.float())


def test_reference_is_what_the_block_computes() -> None:
    case = Case(42, heads=3, dtype=torch.float32, batch=2)
    got = reference.qkv_norm_rope(case.qkv, case.q_gain, case.k_gain, *case.tables, eps=EPS)
    for ours, block in zip(got, case.torch_steps(), strict=True):
        torch.testing.assert_close(ours, block, rtol=1e-6, atol=2e-6)


FAULTS = {
    "last tile written one row short": ("mask = (rows < tokens)[:, None]", "mask = (rows < tokens - 1)[:, None]"),
    "halves of RoPE swapped": ("first * cos - second * sin", "second * cos - first * sin"),
    "RoPE turns the wrong way": ("first * cos - second * sin", "first * cos + second * sin"),
    "partner of the column axis one part off": ("index + 48, index + 64", "index + 64, index + 48"),
    "mean over half a head": ("axis=1)) / HEAD", "axis=1)) / HALF"),
    "k has q's gain": ("low, high, k_gain_ptr", "low, high, q_gain_ptr"),
    "head of the next row": ("mine = source + head * (3 * HEAD)", "mine = source + first_head * (3 * HEAD)"),
    "eps of another norm": ("mean_square + eps", "mean_square + 1e-2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, tmp_path: Path) -> None:
    faulty = mutated(kernel, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check(Case(21, heads=3, dtype=torch.bfloat16, magnitude=0.2), faulty)


FP8_FAULTS: dict[str, tuple[str, str]] = {
    "v has k's scale": ("tl.load(v_scale_ptr + head)", "tl.load(k_scale_ptr + head)"),
    "padding not written": ("mask=(rows < padded)[None, :]", "mask=(rows < tokens)[None, :]"),
    "scale multiplied": ("unit_k = 1.0 / tl.load", "unit_k = tl.load"),
    "v not turned": ("(plane * HEAD + channels[:, None]) * padded", "(plane * HEAD + channels[:, None]) * tokens"),
}


@pytest.mark.parametrize("fault", FP8_FAULTS)
def test_faults_of_fp8_are_caught(fault: str, tmp_path: Path) -> None:
    faulty = mutated(kernel, *FP8_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check_fp8(Case(21, heads=3, dtype=torch.bfloat16), faulty)


def test_only_the_first_half_of_a_part_is_read_from_the_tables() -> None:
    """By the kernel, the reference and the model alike."""
    case = Case(21, heads=2, dtype=torch.bfloat16)
    wanted = reference.qkv_norm_rope(*operands(case), eps=EPS)
    case.tables = spoilt(case.tables[0]), spoilt(case.tables[1])
    check(case)
    for one, other in zip(reference.qkv_norm_rope(*operands(case), eps=EPS), wanted, strict=True):
        assert torch.equal(one, other)


def spoilt(table: Tensor) -> Tensor:
    """Random numbers in the second halves."""
    halves = [half for part in table.split(reference.ROPE_SPLIT, -1) for half in part.chunk(2, -1)]
    return torch.cat([half if index % 2 == 0 else torch.randn(half.shape) for index, half in enumerate(halves)], -1)


def operands(case: Case) -> tuple[Tensor, ...]:
    return case.qkv, case.q_gain, case.k_gain, *case.tables


@pytest.mark.parametrize(
    ("operator", "scaled"), [(op.qkv_norm_rope, False), (op.qkv_norm_rope_fp8, True)], ids=["bf16", "fp8"]
)
def test_operator_is_a_proper_one(operator: Any, scaled: bool) -> None:
    case = Case(5, heads=2, dtype=torch.bfloat16, batch=2)
    torch.library.opcheck(operator, (*operands(case), *(case.scales if scaled else [])))
