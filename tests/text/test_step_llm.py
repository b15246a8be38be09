"""Step-LLM against plain formulas: its slopes, its attention, and that it never looks ahead."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stepvideo_serve.text.step_llm import Attention, FeedForward, RMSNorm, StepLLM, alibi_slopes, sqrt_alibi_bias
from tests.mini import MINI, normal, relative_error, with_random_weights

CONFIG = MINI.llm


def powers(*exponents: float) -> list[float]:
    return [2.0**exponent for exponent in exponents]


def test_slopes_of_a_power_of_two() -> None:
    assert alibi_slopes(8) == [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]


def test_slopes_between_powers_of_two() -> None:
    """The paper's own example, 12 heads: the series of 8, then every other one of 16."""
    expected = powers(-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5)
    assert alibi_slopes(12) == pytest.approx(expected, rel=1e-12)


def test_slopes_of_the_official_model() -> None:
    slopes = alibi_slopes(48)
    assert len(slopes) == 48
    assert slopes[:4] == pytest.approx([0.8408964152537145, 0.7071067811865476, 0.5946035575013605, 0.5], rel=1e-12)
    assert slopes[31] == pytest.approx(0.00390625, rel=1e-12)
    assert slopes[32:35] == pytest.approx([0.9170040432046712, 0.7711054127039704, 0.6484197773255048], rel=1e-12)
    assert slopes[47] == pytest.approx(2**-3.875, rel=1e-12)


def test_slopes_of_six_heads() -> None:
    assert alibi_slopes(6) == pytest.approx(powers(-2, -4, -6, -8, -1, -3), rel=1e-12)


def test_bias_falls_with_the_root_of_the_distance() -> None:
    bias = sqrt_alibi_bias(alibi_slopes(2), 5, torch.device("cpu"))
    never = -math.inf
    root2, root3 = math.sqrt(2), math.sqrt(3)
    steps = torch.tensor(
        [
            [0, never, never, never, never],
            [-1, 0, never, never, never],
            [-root2, -1, 0, never, never],
            [-root3, -root2, -1, 0, never],
            [-2, -root3, -root2, -1, 0],
        ]
    )
    assert torch.allclose(bias[0], steps / 16)
    assert torch.allclose(bias[1], steps / 256)


def test_attention_heads_share_keys_and_values_in_groups() -> None:
    """All queries come first, then key and value of each group side by side; head h uses group h // 3."""
    layer = with_random_weights(Attention(CONFIG))
    length, size = 9, CONFIG.head_dim
    x = normal(length, CONFIG.width)
    bias = sqrt_alibi_bias(alibi_slopes(CONFIG.num_heads), 9, torch.device("cpu"))
    packed = x @ layer.wqkv.weight.T
    heads = []
    for head in range(CONFIG.num_heads):
        pair = CONFIG.width + 2 * size * (head // 3)
        q, k, v = (packed[:, at : at + size] for at in (head * size, pair, pair + size))
        heads.append(torch.softmax(q @ k.T / math.sqrt(size) + bias[head], dim=-1) @ v)
    expected = torch.cat(heads, dim=-1) @ layer.wo.weight.T
    assert relative_error(layer(x[None], bias)[0], expected) < 1e-5


def test_feed_forward_packs_gate_before_up() -> None:
    layer = with_random_weights(FeedForward(CONFIG.width, CONFIG.ffn_width))
    x = normal(4, CONFIG.width)
    gate, up = (x @ half.T for half in layer.w1.weight.split(CONFIG.ffn_width))
    assert relative_error(layer(x), (F.silu(gate) * up) @ layer.w2.weight.T) < 1e-5


def test_norm_is_computed_in_fp32() -> None:
    x = 300 * normal(16, CONFIG.width).bfloat16()
    exact = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(RMSNorm(CONFIG.width, 1e-5).bfloat16()(x), exact.bfloat16())


@pytest.fixture(scope="module")
def llm() -> StepLLM:
    return with_random_weights(StepLLM(CONFIG))


def ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changed", [1, 7, 15])
def test_later_tokens_do_not_change_earlier_states(llm: StepLLM, changed: int) -> None:
    tokens = ids(16)
    before = llm(tokens)
    tokens[0, changed] = (tokens[0, changed] + 1) % CONFIG.vocab_size
    after = llm(tokens)
    assert relative_error(after[:, :changed], before[:, :changed]) < 1e-6
    for position in range(changed, 16):
        assert relative_error(after[:, position], before[:, position]) > 1e-4


def test_a_prefix_has_the_states_that_it_has_alone(llm: StepLLM) -> None:
    """So padding behind the text, which the official code adds, changes nothing."""
    tokens = ids(40)
    assert relative_error(llm(tokens[:, :13]), llm(tokens)[:, :13]) < 1e-5


def test_positions_matter(llm: StepLLM) -> None:
    tokens = ids(12)
    swapped = tokens.clone()
    swapped[0, :2] = tokens[0, [1, 0]]
    assert relative_error(llm(swapped)[:, -1], llm(tokens)[:, -1]) > 1e-4
