"""`stepvideo::vae_attention`, as a torch operator and an ONNX node."""

import torch
from torch import Tensor

from stepvideo_kernels.tensors import sm_of, type_name
from stepvideo_kernels.vae_attention import reference, spec


@torch.library.custom_op("stepvideo::vae_attention", mutates_args=(), device_types="cpu")
def vae_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k and v [B, N, C], C a multiple of 32 -> [B, N, C]; the formula is in reference.py."""
    return reference.vae_attention(q, k, v)


@vae_attention.register_kernel("cuda")
def _on_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from stepvideo_kernels.vae_attention import kernel  # the Triton language is needed on a GPU only

    out = torch.empty_like(q)
    kernel.launch(q, k, v, out, spec.tile(type_name(q.dtype), sm_of(q.device)))
    return out


@vae_attention.register_fake
def _shape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    del k, v
    return torch.empty_like(q)
