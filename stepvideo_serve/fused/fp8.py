"""E4M3 in torch modules: two operators, and the modules that use them. Exported, they are standard ONNX
QuantizeLinear and DequantizeLinear, which TensorRT turns into FP8 matrix products and ONNX Runtime executes as written.

    quantize(x, s)   = E4M3(x / s), saturating at 448, division in fp32, round to nearest even
    dequantize(c, s) = c * s in fp32, rounded to the dtype of s

Axes: K input channels, M output channels, B batch, H heads, N and L tokens.
Sources: arXiv 2209.05433 (FP8 formats); ONNX operators QuantizeLinear and DequantizeLinear, version 23.
"""

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_SCALE = 2.0**-14
SMALLEST_POWER = 2.0**-41
SOFTMAX_AMAX = 1.0
QUANTISED_ROWS = 1024


@torch.library.custom_op("stepvideo_qdq::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x of any shape and float dtype, scale of the same dtype, a scalar or one that broadcasts -> E4M3 of x's shape."""
    return (x.float() / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(FP8)


@torch.library.custom_op("stepvideo_qdq::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """E4M3 of any shape and a scalar scale, or E4M3 [K, M] and scale [M] -> the same shape in the scale's dtype."""
    return (codes.float() * scale.float()).to(scale.dtype)


@quantize.register_fake
def _quantized_like(x: Tensor, scale: Tensor) -> Tensor:
    del scale
    return torch.empty_like(x, dtype=FP8)


@dequantize.register_fake
def _dequantized_like(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """amax / 448 in `dtype`, with the precision of bf16 and at least the smallest normal fp16 number.

    So that a graph has the same codes in bf16 and in fp16. E4M3 is a floating-point format: a scale above the ideal
    one costs range at the small end, not precision.
    """
    return (amax.float() / FP8_MAX).clamp_min(SMALLEST_SCALE).to(torch.bfloat16).to(dtype)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [M, K] -> codes [K, M] in E4M3 and scale [M] in the weight's dtype, a slice of rows at a time."""
    scale = scale_of(weight.abs().amax(dim=1), weight.dtype)
    codes = torch.empty(weight.shape[1], weight.shape[0], dtype=FP8)
    for begin in range(0, len(weight), QUANTISED_ROWS):
        rows = slice(begin, begin + QUANTISED_ROWS)
        codes[:, rows] = quantize(weight[rows], scale[rows, None]).t()
    return codes, scale


class QuantizedLinear(nn.Module):
    """A linear layer without bias: E4M3 weights with a scale per output channel, E4M3 input with one scale.

    The product accumulates in whatever the backend uses; bf16 is safe. Buffers: weight [K, M] E4M3,
    weight_scale [M], input_scale [].
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, linear: nn.Linear, input_amax: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = quantize_rows(linear.weight)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", scale_of(torch.tensor(input_amax), scale.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., M], in the dtype of the scales."""
        weight: Tensor = dequantize(self.weight, self.weight_scale)
        return round_trip(x, self.input_scale) @ weight


class ScaledLinear(nn.Module):
    """QuantizedLinear for a graph whose weights are inputs. Scales of Quantize and Dequantize must be constants: they
    are 1; the input is multiplied with its inverse scale before, the product with both scales after. All are powers of
    two, so that multiplying rounds nothing.

    Buffers, inputs of the graph but for `one`: weight [M, K] E4M3, K contiguous as FP8 instructions read it;
    input_inverse [1] and output_scale [M] in `dtype`, bf16 or fp32: a product without scales needs their range.
    """

    def __init__(self, linear: nn.Linear, input_amax: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        input_scale = power_scale(torch.tensor([input_amax]))
        codes, scale = power_rows(linear.weight)
        self.register_buffer("weight", codes)
        self.register_buffer("output_scale", (scale * input_scale).to(dtype))
        self.register_buffer("input_inverse", (1 / input_scale).to(dtype))
        self.register_buffer("one", torch.ones((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., M], in the dtype of the scales."""
        one = self.get_buffer("one")
        weight: Tensor = dequantize(self.get_buffer("weight"), one)
        product = nn.functional.linear(round_trip(x * self.get_buffer("input_inverse"), one), weight)
        out: Tensor = product * self.get_buffer("output_scale")
        return out


def power_scale(amax: Tensor) -> Tensor:
    """The smallest power of two in fp32 of which 448 hold `amax`, elementwise, or up to twice that, and at least 2^-40.
    E4M3 is a floating-point format: a scale above the ideal one costs range at the small end, not precision."""
    _, exponent = torch.frexp((amax.float() / FP8_MAX).clamp_min(SMALLEST_POWER))
    return torch.ldexp(torch.ones_like(amax, dtype=torch.float32), exponent)


def power_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [M, K] -> codes [M, K] in E4M3 and scale [M] in fp32, powers of two; a slice of rows at a time."""
    codes = torch.empty(weight.shape, dtype=FP8)
    scale = torch.empty(len(weight))
    for begin in range(0, len(weight), QUANTISED_ROWS):
        rows = slice(begin, begin + QUANTISED_ROWS)
        scale[rows] = power_scale(weight[rows].abs().amax(dim=1))
        codes[rows] = quantize(weight[rows].float(), scale[rows, None])
    return codes, scale


HEAD_SCALE = 0.25
"""Of queries and keys in graphs that all blocks share. They are RMS-normed, so no element is beyond sqrt(128) times the
largest gain, and rotation keeps the length: E4M3 has its precision from 2^-8 to 112 of them."""
HEAD_GAINS = (2.0**-4, 9.0)
"""The largest gain of a head's norm must lie here for that."""


class ScaledAttention(nn.Module):
    """QuantizedAttention for a graph whose weights are inputs. Queries and keys have the constant HEAD_SCALE; values
    are multiplied before and after, since the result is linear in them. Inputs: value_inverse and value_scale [1]."""

    def __init__(self, dtype: torch.dtype, v_amax: float) -> None:
        super().__init__()
        scale = power_scale(torch.tensor([v_amax]))
        self.register_buffer("value_inverse", (1 / scale).to(dtype))
        self.register_buffer("value_scale", scale.to(dtype))
        self.register_buffer("one", torch.ones((), dtype=dtype))
        self.register_buffer("head_scale", torch.tensor(HEAD_SCALE, dtype=dtype))
        self.register_buffer("p_scale", scale_of(torch.tensor(SOFTMAX_AMAX), dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, N, d], k and v [B, H, L, d] -> [B, N, H * d]."""
        head_scale = self.get_buffer("head_scale")
        q = round_trip(q, head_scale)
        k = round_trip(k.transpose(2, 3), head_scale)
        v = round_trip(v * self.get_buffer("value_inverse"), self.get_buffer("one"))
        weights = torch.softmax((q @ k) * q.shape[-1] ** -0.5, dim=-1)
        out = (round_trip(weights, self.get_buffer("p_scale")) @ v).transpose(1, 2).flatten(2)
        return out * self.get_buffer("value_scale")


class QuantizedAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with q, k, v and the softmax's result in E4M3; in place of dit.blocks.AttentionCore.

    Written out as product, softmax, product, which TensorRT fuses into one FP8 attention kernel for sequences of 32
    tokens and more, and which ONNX Runtime runs as it stands.
    """

    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    p_scale: Tensor

    def __init__(self, dtype: torch.dtype, q_amax: float, k_amax: float, v_amax: float) -> None:
        super().__init__()
        for name, amax in (("q", q_amax), ("k", k_amax), ("v", v_amax), ("p", SOFTMAX_AMAX)):
            self.register_buffer(f"{name}_scale", scale_of(torch.tensor(amax), dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, N, d], k and v [B, H, L, d] -> [B, N, H * d]."""
        q = round_trip(q, self.q_scale)
        k = round_trip(k.transpose(2, 3), self.k_scale)
        v = round_trip(v, self.v_scale)
        weights = torch.softmax((q @ k) * q.shape[-1] ** -0.5, dim=-1)
        return (round_trip(weights, self.p_scale) @ v).transpose(1, 2).flatten(2)


def round_trip(x: Tensor, scale: Tensor) -> Tensor:
    """The value that E4M3 leaves of x."""
    rounded: Tensor = dequantize(quantize(x, scale), scale)
    return rounded
