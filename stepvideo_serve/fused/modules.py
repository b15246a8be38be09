"""Parts of the networks whose work is done by the fused operators of `stepvideo_kernels`.

Each holds the parameters of the plain part under the same names and takes its place. On a CPU the operators compute
their formulas in torch, so that a network with these parts can be compared with the plain one.
Axes: B batch, N tokens, L keys, D width, H heads.
"""

import torch
from torch import Tensor, nn

from stepvideo_kernels.adaln_modulate.op import (
    adaln_modulate,
    adaln_modulate_fp8,
    adaln_residual,
    adaln_residual_fp8,
)
from stepvideo_kernels.alibi_attention.op import alibi_attention
from stepvideo_kernels.attention.op import attention, attention_fp8
from stepvideo_kernels.attention.spec import VALUE_PADDING, padded_keys
from stepvideo_kernels.qkv_norm_rope.op import qkv_norm_rope, qkv_norm_rope_fp8
from stepvideo_kernels.vae_attention.op import vae_attention
from stepvideo_serve.dit.blocks import AttentionCore, ModulatedNorm, SelfAttention, attend
from stepvideo_serve.dit.config import QK_NORM_EPS
from stepvideo_serve.fused.fp8 import QuantizedLinear, dequantize, quantize
from stepvideo_serve.text.step_llm import Attention
from stepvideo_serve.vae.layers import TokenCausalAttention


class FusedNorm(nn.Module):
    """Norm and modulation in one pass, with the residual before it where there is one."""

    def __init__(self, plain: ModulatedNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = plain.weight, plain.bias, plain.eps

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x [B, N, D], scale and shift [B, 1, D] -> [B, N, D]."""
        y: Tensor = adaln_modulate(x, self.weight, self.bias, scale[:, 0], shift[:, 0], self.eps)
        return y

    def modulated_sum(self, x: Tensor, branch: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """x and branch [B, N, D] -> their sum, and the sum normed and modulated."""
        gate = torch.ones_like(scale[:, 0])
        affine = self.weight, self.bias
        result: tuple[Tensor, Tensor] = adaln_residual(x, branch, gate, *affine, scale[:, 0], shift[:, 0], self.eps)
        return result


class FusedNormFp8(nn.Module):
    """The same with the result in E4M3, for a linear layer that takes codes: no pass of its own casts it.

    out_scale: scalar, what one unit of the codes stands for.
    """

    def __init__(self, wide: FusedNorm, out_scale: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = wide.weight, wide.bias, wide.eps
        self.register_buffer("out_scale", out_scale.detach().float().reshape(1), persistent=False)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x [B, N, D], scale and shift [B, 1, D] -> E4M3 [B, N, D]."""
        operands = x, self.weight, self.bias, scale[:, 0], shift[:, 0], self.get_buffer("out_scale")
        codes: Tensor = adaln_modulate_fp8(*operands, self.eps)
        return codes

    def modulated_sum(self, x: Tensor, branch: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """x and branch [B, N, D] -> their sum, and E4M3 of the sum normed and modulated."""
        gate = torch.ones_like(scale[:, 0])
        operands = x, branch, gate, self.weight, self.bias, scale[:, 0], shift[:, 0], self.get_buffer("out_scale")
        result: tuple[Tensor, Tensor] = adaln_residual_fp8(*operands, self.eps)
        return result


class CodesLinear(nn.Module):
    """A quantised linear layer whose input is E4M3 codes of its input scale already."""

    def __init__(self, plain: QuantizedLinear) -> None:
        super().__init__()
        for name in ("weight", "weight_scale", "input_scale"):
            self.register_buffer(name, plain.get_buffer(name))

    def forward(self, codes: Tensor) -> Tensor:
        """E4M3 [..., K] -> [..., M] in the dtype of the scales."""
        weight, scale = self.get_buffer("weight"), self.get_buffer("weight_scale")
        out: Tensor = dequantize(codes, self.get_buffer("input_scale")) @ dequantize(weight, scale)
        return out


class FusedCore(nn.Module):
    """softmax(q k^T / sqrt(128)) v: [B, H, N, 128] and [B, H, L, 128] twice -> [B, N, 128 H]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attention(q.contiguous(), k.contiguous(), v.contiguous())
        return out


class FusedCoreFp8(nn.Module):
    """The same in E4M3, for attention that is a graph of its own: it casts what it is given.

    q_scale, k_scale, v_scale: scalars, amax / 448. One for all heads: those of every block pass through here.
    """

    def __init__(self, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor) -> None:
        """Each [1] fp32 > 0."""
        super().__init__()
        for name, scale in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
            self.register_buffer(name, scale.reshape(()).bfloat16(), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """bf16 q [B, H, N, 128], k and v [B, H, L, 128] -> bf16 [B, N, 128 H]."""
        scales = [self.get_buffer(name) for name in ("q_scale", "k_scale", "v_scale")]
        columns = nn.functional.pad(v.transpose(2, 3), (0, VALUE_PADDING))[..., : padded_keys(v.shape[2])]
        codes = [quantize(x.contiguous(), scale) for x, scale in zip((q, k, columns), scales, strict=True)]
        out: Tensor = attention_fp8(*codes, *(scale.float().repeat(q.shape[1]) for scale in scales))
        return out


class PairedCore(AttentionCore):
    """The plain attention of one head as that of two equal ones, the second of which is dropped. FP8 takes its place.

    TensorRT-RTX 1.7 has no kernel for one head in a batch of one, and refuses most such graphs ("not supported by a
    dedicated kernel": attention to the text always, among few tokens too); two heads it takes. Only slices of small
    models have one.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, 1, N, 128], k and v [1, 1, L, 128] -> [1, N, 128]."""
        pairs = (torch.cat([x, x], dim=1) for x in (q, k, v))
        return attend(*pairs)[..., : q.shape[-1]]


class FusedSelfAttention(nn.Module):
    """Split, head norm, rotation and layout of the projection in one pass, then a core."""

    def __init__(self, plain: SelfAttention, core: nn.Module) -> None:
        super().__init__()
        self.wqkv, self.wo = plain.wqkv, plain.wo
        self.q_norm, self.k_norm = plain.q_norm, plain.k_norm
        self.core = core

    def project(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D], tables [N, 128] fp32 -> queries, keys and values, each [B, H, N, 128]."""
        gains = self.q_norm.weight, self.k_norm.weight
        result: tuple[Tensor, Tensor, Tensor] = qkv_norm_rope(self.wqkv(x), *gains, rope_cos, rope_sin, QK_NORM_EPS)
        return result

    def forward(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        out: Tensor = self.wo(self.core(*self.project(x, rope_cos, rope_sin)))
        return out


class FusedSelfAttentionFp8(FusedSelfAttention):
    """The same with queries, keys and values in E4M3 between the two operators; `project` and `core` are not used.

    q_scale, k_scale, v_scale [H] fp32 > 0: what one unit of a head's stored values stands for, amax / 448.
    """

    def __init__(self, plain: SelfAttention, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor) -> None:
        super().__init__(plain, FusedCore())
        for name, scale in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
            self.register_buffer(name, scale, persistent=False)

    def forward(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        gains = self.q_norm.weight, self.k_norm.weight
        scales = (self.get_buffer("q_scale"), self.get_buffer("k_scale"), self.get_buffer("v_scale"))
        q, k, v = qkv_norm_rope_fp8(self.wqkv(x), *gains, rope_cos, rope_sin, *scales, QK_NORM_EPS)
        out: Tensor = self.wo(attention_fp8(q, k, v, *scales))
        return out


class FusedAlibiAttention(nn.Module):
    """Step-LLM's attention with its bias made in the kernel."""

    def __init__(self, plain: Attention, slopes: list[float]) -> None:
        """slopes: one for each head of `plain`."""
        super().__init__()
        self.wqkv, self.wo = plain.wqkv, plain.wo
        self.register_buffer("slopes", torch.tensor(slopes, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]; the bias tensor of the plain part is not used."""
        del bias
        out: Tensor = self.wo(alibi_attention(self.wqkv(x), self.get_buffer("slopes")))
        return out


class FusedTokenCausalAttention(nn.Module):
    """The VAE's attention: one head over all T * H * W positions in raster order."""

    def __init__(self, plain: TokenCausalAttention) -> None:
        super().__init__()
        self.norm = plain.norm
        self.q, self.k, self.v, self.proj_out = plain.q, plain.k, plain.v, plain.proj_out

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> the same shape."""
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2).contiguous() for project in (self.q, self.k, self.v))
        out = vae_attention(q, k, v)
        result: Tensor = x + self.proj_out(out.transpose(1, 2).unflatten(2, x.shape[2:]))
        return result
