"""The whole DiT as one module with the official parameter names, in the five parts that become engines.

Axes: B batch, F latent frames, C latent channels, N video tokens, L text tokens, D width, P values of one patch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepvideo_serve.dit.blocks import DiTBlock, modulate
from stepvideo_serve.dit.config import OUTER_NORM_EPS, DiTConfig
from stepvideo_serve.dit.embeddings import AdaLayerNormSingle, CaptionProjection
from stepvideo_serve.dit.rope import rope_tables


class PatchEmbed(nn.Module):
    """A convolution with stride = kernel = patch, applied as a linear map on tokens that are already patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(2 * config.in_channels, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class StepVideoDiT(nn.Module):
    """Velocity of the flow at (latent, time), given text states, the first frame's latent and a motion score."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.pos_embed = PatchEmbed(config)
        self.adaln_single = AdaLayerNormSingle(width)
        self.caption_norm = nn.LayerNorm(config.llm_channels, eps=OUTER_NORM_EPS, elementwise_affine=False)
        self.caption_projection = CaptionProjection(config.llm_channels, width)
        self.clip_projection = nn.Linear(config.clip_channels, width)
        self.transformer_blocks = nn.ModuleList(DiTBlock(width) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(width, eps=OUTER_NORM_EPS, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.out_channels)

    def context(self, llm_states: Tensor, clip_states: Tensor) -> Tensor:
        """LLM states [B, L, .] of valid tokens only and CLIP states [B, 77, .] -> text context [B, 77 + L, D]."""
        captions = self.caption_projection(self.caption_norm(llm_states))
        return torch.cat([self.clip_projection(clip_states), captions], dim=1)

    def embed(
        self, latent_tokens: Tensor, condition_tokens: Tensor, timestep: Tensor, motion_score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Patches of latent and condition [B, N, P], timestep [B] in 0..1, motion score [B] ->
        tokens [B, N, D], modulation [B, 6, D], time embedding [B, D]."""
        patches = torch.cat([latent_tokens, condition_tokens], dim=-1)
        modulation, embedding = self.adaln_single(timestep, motion_score)
        return self.pos_embed(patches), modulation, embedding

    def final(self, tokens: Tensor, time_embedding: Tensor) -> Tensor:
        """tokens [B, N, D], time embedding [B, D] -> velocity patches [B, N, P']."""
        shift, scale = (self.scale_shift_table + time_embedding[:, None]).split(1, dim=1)
        return self.proj_out(modulate(self.norm_out(tokens), scale, shift))

    def forward(
        self,
        latents: Tensor,
        condition: Tensor,
        timestep: Tensor,
        motion_score: Tensor,
        llm_states: Tensor,
        clip_states: Tensor,
    ) -> Tensor:
        """latents [B, F, C, h, w], condition [B, F, C, h, w] (zeros but in frame 0), the rest as above -> velocity
        [B, F, C', h, w]. The yardstick for the parts run as engines."""
        patch = self.config.patch_size
        frames, height, width = latents.shape[1], latents.shape[3] // patch, latents.shape[4] // patch
        cos, sin = (table.to(latents.device) for table in rope_tables(frames, height, width))
        tokens, modulation, embedding = self.embed(
            patchify(latents, patch), patchify(condition, patch), timestep, motion_score
        )
        context = self.context(llm_states, clip_states)
        for block in self.transformer_blocks:
            assert isinstance(block, DiTBlock)
            tokens = block(tokens, modulation, cos, sin, *block.attn2.keys_values(context))
        return unpatchify(self.final(tokens, embedding), frames, height, width, patch)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[B, F, C, h, w] -> [B, N, C * patch * patch], tokens in raster order, channels before patch rows and columns."""
    batch, frames, channels, height, width = latents.shape
    x = latents.reshape(batch, frames, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, -1, channels * patch**2)


def unpatchify(patches: Tensor, frames: int, height: int, width: int, patch: int) -> Tensor:
    """[B, frames * height * width, patch * patch * C] -> [B, F, C, height * patch, width * patch].

    Unlike on the way in, the model's output has patch rows and columns before channels.
    """
    x = patches.reshape(patches.shape[0], frames, height, width, patch, patch, -1)
    return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(patches.shape[0], frames, -1, height * patch, width * patch)
