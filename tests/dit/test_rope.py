"""Rotary positions: what attention sees of them is the offset between two tokens, in three dimensions."""

import math

import pytest
import torch
from torch import Tensor

from stepvideo_serve.dit.rope import apply_rope, rope_tables
from tests.mini import normal

GRID = (4, 5, 6)
HEAD = 128


def token(frame: int, row: int, column: int) -> int:
    """Index in raster order."""
    return (frame * GRID[1] + row) * GRID[2] + column


@pytest.fixture(scope="module")
def scores() -> Tensor:
    """[N, N]: the product of one query at every position with one key at every position."""
    tables = rope_tables(*GRID)
    query, key = (
        apply_rope(normal(HEAD, seed=seed).expand(1, math.prod(GRID), 1, HEAD), *tables)[0, :, 0] for seed in (1, 2)
    )
    return query @ key.T


@pytest.mark.parametrize("offset", [(0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 3), (2, 1, 1), (3, 4, 5)])
def test_products_depend_on_the_offset_only(scores: Tensor, offset: tuple[int, int, int]) -> None:
    frames, rows, columns = (range(size - step) for size, step in zip(GRID, offset, strict=True))
    values = torch.stack(
        [
            scores[token(f, r, c), token(f + offset[0], r + offset[1], c + offset[2])]
            for f in frames
            for r in rows
            for c in columns
        ]
    )
    assert torch.allclose(values, values[0].expand_as(values), atol=1e-4)


def test_products_differ_between_offsets(scores: Tensor) -> None:
    from_first = scores[0]
    assert len({round(float(value), 3) for value in from_first}) > 0.9 * math.prod(GRID)


def test_rotation_keeps_the_length_and_the_first_token() -> None:
    x = normal(2, math.prod(GRID), 3, HEAD)
    rotated = apply_rope(x, *rope_tables(*GRID))
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.equal(rotated[:, 0], x[:, 0])


@pytest.mark.parametrize(
    ("position", "turning"), [((1, 0, 0), slice(0, 64)), ((0, 1, 0), slice(64, 96)), ((0, 0, 1), slice(96, 128))]
)
def test_each_axis_turns_its_own_channels(position: tuple[int, int, int], turning: slice) -> None:
    cos, sin = (table[token(*position)] for table in rope_tables(*GRID))
    still = torch.ones(HEAD, dtype=torch.bool)
    still[turning] = False
    assert torch.equal(cos[still], torch.ones(int(still.sum())))
    assert torch.equal(sin[still], torch.zeros(int(still.sum())))
    assert (sin[turning] > 0).all()


def test_angles_are_positions_times_falling_frequencies() -> None:
    cos, sin = rope_tables(*GRID)
    index = token(3, 2, 5)
    for first, channels, position in ((0, 64, 3), (64, 32, 2), (96, 32, 5)):
        for i in range(channels // 2):
            angle = position * 1e4 ** (-2 * i / channels)
            for channel in (first + i, first + i + channels // 2):
                assert cos[index, channel] == pytest.approx(math.cos(angle), abs=1e-6)
                assert sin[index, channel] == pytest.approx(math.sin(angle), abs=1e-6)


def test_pairs_are_halves_of_a_part() -> None:
    """Channel i of a part turns towards channel i + half."""
    x = torch.zeros(1, math.prod(GRID), 1, HEAD)
    x[..., 64] = 1.0
    rotated = apply_rope(x, *rope_tables(*GRID))[0, token(0, 1, 0), 0]
    assert set(rotated.nonzero().flatten().tolist()) == {64, 80}
    assert rotated[64] == pytest.approx(math.cos(1.0))
    assert rotated[80] == pytest.approx(math.sin(1.0))


def test_bf16_inputs_are_turned_in_fp32() -> None:
    """Rounding happens once, at the end; far positions stay exact."""
    tables = rope_tables(400, 1, 1)
    x = normal(1, 400, 1, HEAD).bfloat16()
    exact = apply_rope(x.float(), *tables)
    assert torch.equal(apply_rope(x, *tables), exact.bfloat16())
