"""E4M3 in torch: codes, scales, layers; and the same bits from the exported operators in ONNX Runtime."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from export.graphs.translation import translation_table
from stepvideo_serve.dit.blocks import attend
from stepvideo_serve.fused.fp8 import (
    FP8,
    FP8_MAX,
    QuantizedAttention,
    QuantizedLinear,
    dequantize,
    quantize,
    quantize_rows,
    round_trip,
    scale_of,
)
from tests.mini import normal

HALF_STEP = 2.0**-4  # of E4M3, relative: three bits of mantissa
LEAST = 2.0**-10  # half of its smallest number


def all_codes() -> Tensor:
    """The finite E4M3 numbers, ascending, in fp64."""
    values = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    finite: Tensor = values[values.isfinite()].unique()
    return finite


def test_codes_are_the_nearest_numbers_and_saturate() -> None:
    numbers = all_codes()
    scale = torch.tensor(0.03125)  # a power of two: x / scale is exact, and so is the distance
    x = torch.cat([normal(20000) * 5, torch.tensor([0.0, 14.0, -14.0, 1e4, -1e4, 13.9])])
    found = quantize(x, scale).double()
    nearest = (x.double()[:, None] / 0.03125 - numbers).abs().min(dim=1).values
    assert torch.equal((x.double() / 0.03125 - found).abs(), nearest)
    assert float(quantize(torch.tensor(1e6), scale)) == FP8_MAX


@pytest.mark.parametrize("amax", [0.0, 1e-6, 0.02, 1.0, 5.37, 448.0, 3e4])
def test_a_scale_has_the_same_bits_in_bf16_and_fp16(amax: float) -> None:
    bf16, fp16 = (scale_of(torch.tensor(amax), dtype) for dtype in (torch.bfloat16, torch.float16))
    assert float(bf16) == float(fp16) > 0
    assert amax / float(bf16) <= FP8_MAX * (1 + 2.0**-8)


def test_weights_have_the_same_codes_whatever_the_dtype_of_the_graph() -> None:
    weight = (normal(70, 33) * torch.logspace(-5, 1, 70)[:, None]).bfloat16()
    codes, scale = quantize_rows(weight)
    other, other_scale = quantize_rows(weight.float())
    assert codes.shape == (33, 70)
    assert torch.equal(codes.view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(scale.float(), other_scale)


def test_rows_are_quantised_alike_in_one_slice_or_several(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(70, 33)
    whole, _ = quantize_rows(weight)
    monkeypatch.setattr("stepvideo_serve.fused.fp8.QUANTISED_ROWS", 32)
    sliced, _ = quantize_rows(weight)
    assert torch.equal(whole.view(torch.uint8), sliced.view(torch.uint8))


def test_a_linear_layer_is_off_by_no_more_than_its_roundings() -> None:
    """Each factor is off by half a step of its own, or half the smallest number times its scale."""
    linear = nn.Linear(96, 40, bias=False)
    x = normal(5, 96)
    layer = QuantizedLinear(linear, float(x.abs().max()))
    weight = linear.weight.detach().double()
    w_bound = (weight.abs() * HALF_STEP).maximum(layer.weight_scale.double()[:, None] * LEAST)
    x_bound = (x.double().abs() * HALF_STEP).maximum(layer.input_scale.double() * LEAST)
    allowed = x_bound @ weight.abs().t() + (x.double().abs() + x_bound) @ w_bound.t()
    with torch.no_grad():
        found, exact = layer(x).double(), linear(x).double()
    assert bool(((found - exact).abs() <= allowed * (1 + 1e-5)).all())
    assert float((found - exact).abs().max()) > 0


def test_attention_of_values_that_e4m3_holds_loses_only_in_the_weights() -> None:
    q, k = (round_trip(normal(1, 2, 40, 128, seed=seed), scale_of(torch.tensor(4.0), torch.float32)) for seed in (0, 1))
    v = round_trip(normal(1, 2, 40, 128, seed=2), scale_of(torch.tensor(4.0), torch.float32))
    core = QuantizedAttention(torch.float32, 4.0, 4.0, 4.0)
    weights = torch.softmax(q.double() @ k.double().transpose(2, 3) / 128**0.5, dim=-1)
    rounding = (weights * HALF_STEP).maximum(core.p_scale.double() * LEAST)
    allowed = (rounding @ v.double().abs()).transpose(1, 2).flatten(2)
    found, exact = core(q, k, v).double(), attend(q.double(), k.double(), v.double())
    assert bool(((found - exact).abs() <= allowed * (1 + 1e-4)).all())


class RoundTrip(nn.Module):
    """x as E4M3 leaves it, and a weight of channels with scales of their own."""

    codes: Tensor
    scales: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        codes, scales = quantize_rows(normal(16, 24).to(dtype))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("scale", scale_of(torch.tensor(3.3), dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight: Tensor = dequantize(self.codes, self.scales)
        return round_trip(x, self.get_buffer("scale")), weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_exported_operators_give_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    module, x = RoundTrip(dtype).eval(), (normal(64, 24) * 2).to(dtype)
    program = torch.onnx.export(
        module, (x,), dynamo=True, opset_version=23, custom_translation_table=translation_table(), verbose=False
    )
    assert program is not None
    program.save(str(tmp_path / "graph.onnx"))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for value, expected in zip(found, module(x), strict=True):
        assert torch.equal(torch.from_numpy(value), expected)
