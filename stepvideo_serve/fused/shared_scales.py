"""FP8 parts with fused operators for graphs whose weights are inputs: nothing of a layer stays in them.

The operators take their scales as tensors, which may be inputs of the graph as well. A part says in `scale_inputs`
which of its buffers are: name -> the layer whose scale it is, by its path in the module, and its form (engine/spec.py).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepvideo_kernels.attention.op import attention_fp8
from stepvideo_kernels.attention.spec import VALUE_PADDING, padded_keys
from stepvideo_serve.dit.blocks import DiTBlock
from stepvideo_serve.engine.spec import CODES, INPUT_SCALE, OUTPUT_SCALE, VALUE_INVERSE, VALUE_SCALE
from stepvideo_serve.fused.choose import NORM_FEEDS
from stepvideo_serve.fused.fp8 import HEAD_SCALE, ScaledLinear, dequantize, power_scale, quantize
from stepvideo_serve.fused.modules import FusedCoreFp8, FusedNorm, FusedNormFp8, FusedSelfAttentionFp8

ScaleInputs = Mapping[str, tuple[str, str]]


class SharedSelfAttentionFp8(FusedSelfAttentionFp8):
    """Queries and keys have the constant HEAD_SCALE, values a power of two for all heads, which is an input."""

    def __init__(self, plain: FusedSelfAttentionFp8, path: str, v_amax: float) -> None:
        heads = plain.get_buffer("v_scale").numel()
        head = torch.full((heads,), HEAD_SCALE)
        super().__init__(plain, head, head.clone(), power_scale(torch.tensor([v_amax])).repeat(heads))  # type: ignore[arg-type]  # it has the parts of a plain one
        self.scale_inputs: ScaleInputs = {"v_scale": (f"{path}.core", VALUE_SCALE)}


class SharedCoreFp8(nn.Module):
    """FusedCoreFp8 in which scales of casts are constants: queries and keys have HEAD_SCALE, values are multiplied
    before and after. Inputs: value_inverse and value_scale [1]."""

    def __init__(self, path: str, v_amax: float) -> None:
        super().__init__()
        scale = power_scale(torch.tensor([v_amax]))
        self.register_buffer("value_inverse", (1 / scale).bfloat16())
        self.register_buffer("value_scale", scale.bfloat16())
        self.register_buffer("head_scale", torch.tensor(HEAD_SCALE).bfloat16())
        self.register_buffer("one", torch.ones(()).bfloat16())
        self.scale_inputs: ScaleInputs = {form: (path, form) for form in (VALUE_INVERSE, VALUE_SCALE)}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bf16 q [B, H, N, 128], k and v [B, H, L, 128] -> bf16 [B, N, 128 H]."""
        head, one = self.get_buffer("head_scale"), self.get_buffer("one")
        columns = nn.functional.pad(v.transpose(2, 3), (0, VALUE_PADDING))[..., : padded_keys(v.shape[2])]
        pairs = ((q, head), (k, head), (columns * self.get_buffer("value_inverse"), one))
        codes = [quantize(x.contiguous(), scale) for x, scale in pairs]
        out: Tensor = attention_fp8(*codes, *(scale.float().repeat(q.shape[1]) for _, scale in pairs))
        return out * self.get_buffer("value_scale")


class SharedNormFp8(FusedNormFp8):
    """FusedNormFp8 whose scale, that of the inputs of the layer at the path `feeds`, is an input."""

    def __init__(self, wide: FusedNorm, linear: ScaledLinear, feeds: str) -> None:
        super().__init__(wide, 1 / linear.get_buffer("input_inverse"))
        self.scale_inputs: ScaleInputs = {"out_scale": (feeds, INPUT_SCALE)}


class ScaledCodesLinear(nn.Module):
    """A ScaledLinear whose input is E4M3 codes of its input scale already."""

    def __init__(self, plain: ScaledLinear, path: str) -> None:
        super().__init__()
        for name in ("weight", "output_scale", "one"):
            self.register_buffer(name, plain.get_buffer(name))
        self.scale_inputs: ScaleInputs = {"weight": (path, CODES), "output_scale": (path, OUTPUT_SCALE)}

    def forward(self, codes: Tensor) -> Tensor:
        """E4M3 [..., K] -> [..., M] in the dtype of the scales."""
        one = self.get_buffer("one")
        product = nn.functional.linear(dequantize(codes, one), dequantize(self.get_buffer("weight"), one))
        out: Tensor = product * self.get_buffer("output_scale")
        return out


def share_scales(module: nn.Module, v_amax: float | None) -> None:
    """Puts these parts, in place, into a module whose operators are fused (choose.apply_ops) and whose linear layers
    are scaled. v_amax: of the values of its FP8 attention, None for a graph that has none."""
    for path, part in list(module.named_modules()):
        if isinstance(part, FusedSelfAttentionFp8) and v_amax is not None:
            module.set_submodule(path, SharedSelfAttentionFp8(part, path, v_amax))
        elif isinstance(part, FusedCoreFp8) and v_amax is not None:
            module.set_submodule(path, SharedCoreFp8(path, v_amax))
    for path, block in list(module.named_modules()):
        if isinstance(block, DiTBlock):
            _share_norms(block, f"{path}." if path else "")


def _share_norms(block: DiTBlock, before: str) -> None:
    for norm_path, linear_path in NORM_FEEDS.items():
        norm, linear = block.get_submodule(norm_path), block.get_submodule(linear_path)
        if isinstance(norm, FusedNorm) and isinstance(linear, ScaledLinear):
            block.set_submodule(norm_path, SharedNormFp8(norm, linear, before + linear_path))
            block.set_submodule(linear_path, ScaledCodesLinear(linear, before + linear_path))
