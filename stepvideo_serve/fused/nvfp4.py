"""NVFP4 in torch modules: four-bit weights and inputs of linear layers, for tensor cores from Blackwell on.

    E2M1       0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, round to nearest even, saturating at 6
    scale      one E4M3 per block of 16 along the input channels, times one fp32 for the tensor:
               g = amax / (6 * 448), s = E4M3(amax of the block / 6 / g), value = E2M1(x / (s g)) * s g

Weights are quantised here, inputs while running (their g from the calibration). Exported, a weight is two standard
DequantizeLinear, an input TensorRT's own TRT_FP4DynamicQuantize and two DequantizeLinear, which TensorRT turns into FP4
matrix products. ONNX Runtime has no such operator.

Axes: K input channels, a multiple of 16, M output channels.
Sources: OCP Microscaling Formats 1.0 (E2M1); NVIDIA TensorRT documentation, "Working with Quantized Types" (NVFP4).
"""

import torch
from torch import Tensor, nn

BLOCK = 16
FP4_MAX = 6.0
SCALE_MAX = 448.0
SMALLEST_SCALE = 2.0**-9  # of E4M3
QUANTISED_ROWS = 1024
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Upper ends of the codes 0 .. 6, and whether the end itself belongs to the next code: the even one of the two.
_ENDS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def encode(x: Tensor) -> Tensor:
    """x of any shape -> uint8 codes 0 .. 15 of E2M1; 8 is the sign."""
    size = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for end, next_code in _ENDS:
        code += size >= end if next_code else size > end
    return code.bitwise_or((x < 0).to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """uint8 codes -> fp32."""
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=codes.device)
    return values[codes.long()]


def global_scale(amax: float) -> Tensor:
    """g of a tensor with this largest magnitude: fp32 []."""
    return torch.tensor(max(amax, 2.0**-20) / (FP4_MAX * SCALE_MAX), dtype=torch.float32)


def block_scales(x: Tensor, g: Tensor) -> Tensor:
    """x [.., K] -> E4M3 [.., K / 16], never 0: a block of zeros must not divide by it."""
    amax = x.float().unflatten(-1, (-1, BLOCK)).abs().amax(dim=-1)
    scales: Tensor = (amax / FP4_MAX / g).clamp(SMALLEST_SCALE, SCALE_MAX)
    return scales.to(torch.float8_e4m3fn)


def scaled(x: Tensor, scales: Tensor, g: Tensor) -> Tensor:
    """x [.., K] over the scales of its blocks."""
    values: Tensor = x.float().unflatten(-1, (-1, BLOCK)) / (scales.float() * g)[..., None]
    return values.flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """[M, K] -> [M, K / 2], as ONNX stores four-bit numbers: the first of two in the lower half of the byte."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


@torch.library.custom_op("stepvideo_nvfp4::round_trip", mutates_args=())
def round_trip(x: Tensor, g: Tensor) -> Tensor:
    """What NVFP4 leaves of x [.., K], quantised by its own blocks: fp32."""
    scales = block_scales(x, g)
    return dequantized(encode(scaled(x, scales, g)), scales, g)


@torch.library.custom_op("stepvideo_nvfp4::weight", mutates_args=())
def weight(packed: Tensor, scales: Tensor, g: Tensor) -> Tensor:
    """packed uint8 [M, K / 2], scales E4M3 [M, K / 16], g [] -> fp32 [M, K]."""
    codes: Tensor = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return dequantized(codes, scales, g)


def dequantized(codes: Tensor, scales: Tensor, g: Tensor) -> Tensor:
    """codes uint8 [.., K], scales [.., K / 16] -> fp32 [.., K]."""
    values: Tensor = decode(codes).unflatten(-1, (-1, BLOCK)) * (scales.float() * g)[..., None]
    return values.flatten(-2)


@round_trip.register_fake
def _like_input(x: Tensor, g: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=g.dtype)


@weight.register_fake
def _like_weight(packed: Tensor, scales: Tensor, g: Tensor) -> Tensor:
    del scales
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=g.dtype)


class Fp4Linear(nn.Module):
    """A linear layer without bias in NVFP4. Buffers: weight uint8 [M, K / 2], scales E4M3 [M, K / 16], g [] and
    input_g [] fp32."""

    weight: Tensor
    scales: Tensor
    g: Tensor
    input_g: Tensor

    def __init__(self, linear: nn.Linear, input_amax: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        wide = linear.weight.detach()
        g = global_scale(float(wide.abs().amax()))
        packed = torch.empty(len(wide), wide.shape[1] // 2, dtype=torch.uint8)
        scales = torch.empty(len(wide), wide.shape[1] // BLOCK, dtype=torch.float8_e4m3fn)
        for begin in range(0, len(wide), QUANTISED_ROWS):
            rows = slice(begin, begin + QUANTISED_ROWS)
            scales[rows] = block_scales(wide[rows], g)
            packed[rows] = pack(encode(scaled(wide[rows], scales[rows], g)))
        for name, buffer in (("weight", packed), ("scales", scales), ("g", g), ("input_g", global_scale(input_amax))):
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., M], in the dtype of x."""
        wide: Tensor = weight(self.weight, self.scales, self.g)
        values: Tensor = round_trip(x, self.input_g)
        return values.to(x.dtype) @ wide.to(x.dtype).t()
