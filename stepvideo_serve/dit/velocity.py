"""The DiT as a function of (latent, time), put together from its graphs.

What depends on the request only (text context, cross-attention keys and values, RoPE tables, condition) is computed
once, in `DiTVelocity.prepare`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.model import patchify, unpatchify
from stepvideo_serve.dit.rope import rope_tables
from stepvideo_serve.text.states import TextStates

Graph = Callable[..., dict[str, Tensor]]
KeysValues = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PreparedRequest:
    """All that stays the same over the steps of one request."""

    grid: tuple[int, int, int]
    condition_tokens: Tensor
    motion_score: Tensor
    rope_cos: Tensor
    rope_sin: Tensor
    branches: tuple[KeysValues, ...]


class GuidedVelocity(Protocol):
    """What the loop needs of the DiT, on one rank or on several."""

    def prepare(
        self, shape: tuple[int, ...], condition: Tensor, motion_score: float, texts: tuple[TextStates, ...]
    ) -> PreparedRequest:
        """Everything that stays the same over the steps."""
        ...

    def __call__(self, latents: Tensor, time: float, request: PreparedRequest) -> tuple[Tensor, ...]:
        """One velocity per text."""
        ...


class DiTVelocity:
    """Runs the graphs `dit_*` on their device, in their dtype; latents and velocities outside are fp32 on the CPU."""

    def __init__(
        self, graphs: Mapping[str, Graph], config: DiTConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self._dtype = dtype
        self._device = torch.device(device)
        self._context, self._embed, self._final = (graphs[f"dit_{name}"] for name in ("context", "embed", "final"))
        self._cross = [graphs[f"dit_cross_{i:02d}"] for i in range(config.num_layers)]
        self._blocks = [graphs[f"dit_block_{i:02d}"] for i in range(config.num_layers)]

    def prepare(
        self, shape: tuple[int, ...], condition: Tensor, motion_score: float, texts: tuple[TextStates, ...]
    ) -> PreparedRequest:
        """shape = [F, C, h, w] of the latents, condition [C, h, w] = latent of the first image, one branch per text."""
        patch = self.config.patch_size
        grid = (shape[0], shape[2] // patch, shape[3] // patch)
        frames = torch.zeros(1, *shape)
        frames[0, 0] = condition
        cos, sin = rope_tables(*grid)
        return PreparedRequest(
            grid=grid,
            condition_tokens=self._own(patchify(frames, patch)),
            motion_score=torch.tensor([motion_score], device=self._device),
            rope_cos=cos.to(self._device),
            rope_sin=sin.to(self._device),
            branches=tuple(self._keys_values(text) for text in texts),
        )

    def __call__(self, latents: Tensor, time: float, request: PreparedRequest) -> tuple[Tensor, ...]:
        """latents [F, C, h, w] fp32, time in 0..1 -> one velocity [F, C', h, w] fp32 per branch of the request."""
        patch = self.config.patch_size
        start = self._embed(
            latent_tokens=self._own(patchify(latents[None], patch)),
            condition_tokens=request.condition_tokens,
            timestep=torch.tensor([time], device=self._device),
            motion_score=request.motion_score,
        )
        return tuple(self._branch(start, request, branch) for branch in request.branches)

    def _branch(self, start: dict[str, Tensor], request: PreparedRequest, branch: KeysValues) -> Tensor:
        tokens = start["tokens"]
        for block, (cross_k, cross_v) in zip(self._blocks, branch, strict=True):
            tokens = block(
                tokens=tokens,
                modulation=start["modulation"],
                rope_cos=request.rope_cos,
                rope_sin=request.rope_sin,
                cross_k=cross_k,
                cross_v=cross_v,
            )["tokens_out"]
        velocity = self._final(tokens=tokens, time_embedding=start["time_embedding"])["velocity"]
        return unpatchify(velocity.float().cpu(), *request.grid, self.config.patch_size)[0]

    def _keys_values(self, text: TextStates) -> KeysValues:
        parts = self._context(llm_states=self._own(text.llm[None]), clip_states=self._own(text.clip[None]))
        context = torch.cat([parts["clip_context"], parts["llm_context"]], dim=1)
        pairs = (cross(context=context) for cross in self._cross)
        return [(pair["cross_k"], pair["cross_v"]) for pair in pairs]

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)
