"""Dimensions for tests that need a whole checkpoint and little time, and random networks with weights like its."""

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.tiny.config import ClipDims, TinyConfig
from export.tiny_checkpoint import random_state
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.request import RequestLimits, parse_request, rank_settings
from stepvideo_serve.request.field import Setting
from stepvideo_serve.text.step_llm import StepLLMConfig
from stepvideo_serve.vae.config import VAEConfig

M = TypeVar("M", bound=nn.Module)

MINI = TinyConfig(
    dit=DiTConfig(
        num_heads=2, num_layers=2, in_channels=4, out_channels=4, patch_size=1, llm_channels=48, clip_channels=32
    ),
    llm=StepLLMConfig(width=48, num_heads=6, num_groups=2, num_layers=2, ffn_width=256, vocab_size=768, norm_eps=1e-5),
    clip=ClipDims(width=32, num_heads=2, num_layers=1, ffn_width=48, max_positions=80),
    vae=VAEConfig(
        z_channels=4,
        num_res_blocks=1,
        encoder_stem=32,
        encoder_widths=(64, 64, 96, 64),
        decoder_widths=(64, 64, 96, 64),
    ),
)


def with_random_weights(module: M, seed: int = 3) -> M:
    """The module in fp32 and evaluation mode, its weights set as in the tiny checkpoint."""
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    module.load_state_dict({key: tensor.float() for key, tensor in random_state(shapes, seed).items()})
    return module.requires_grad_(False).eval()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal fp32 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, relative to the largest magnitude of the reference."""
    return float((value - reference).abs().max() / reference.abs().max())


def job_settings(
    steps: int, cfg_scale: float = 9.0, preview_every: int = 0, time_shift: float = 7.0
) -> dict[str, Setting]:
    """What the ranks get of a request with these values (request.rank_settings)."""
    request = parse_request({"PROMPT": bytes_of(b""), "IMAGE": bytes_of(b"x")}, RequestLimits(), 4)
    chosen = {"steps": steps, "cfg_scale": cfg_scale, "time_shift": time_shift, "preview_every": preview_every}
    return {**rank_settings(request), **chosen}


def bytes_of(value: bytes) -> NDArray[np.object_]:
    """A BYTES input."""
    return np.array([value], np.object_)
