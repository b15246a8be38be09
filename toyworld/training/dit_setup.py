"""How the toy DiT begins, and its forward pass for a batch of prompts of different lengths."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepvideo_serve.dit.blocks import DiTBlock, modulate
from stepvideo_serve.dit.config import HEAD_DIM, ROPE_SPLIT, DiTConfig
from stepvideo_serve.dit.model import StepVideoDiT, patchify, unpatchify
from stepvideo_serve.dit.rope import rope_tables
from stepvideo_serve.text.states import TextStates

TOY_HEADS, TOY_LAYERS = 2, 3
SILENT = ("attn1.wo.weight", "attn2.wo.weight", "ff.net.2.weight", "proj_out.weight", "adaln_single.linear.weight")


@dataclass(frozen=True)
class TextBatch:
    """States of B prompts: llm [B, L, D] with zeros behind each prompt's own tokens, clip [B, 77, D], and `real`
    [B, 77 + L], true where the context has a token."""

    llm: Tensor
    clip: Tensor
    real: Tensor


def toy_dit(latent_channels: int, llm_channels: int, clip_channels: int) -> StepVideoDiT:
    """The network, not yet initialised."""
    config = DiTConfig(
        num_heads=TOY_HEADS,
        num_layers=TOY_LAYERS,
        in_channels=latent_channels,
        out_channels=latent_channels,
        patch_size=1,
        llm_channels=llm_channels,
        clip_channels=clip_channels,
    )
    return StepVideoDiT(config)


def initialise(dit: StepVideoDiT, seed: int) -> None:
    """Sets every parameter: matrices normal with variance 1 / fan-in, ends of residual branches and the velocity 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name.endswith((*SILENT, "scale_shift_table")):
                parameter.zero_()
            else:
                parameter.normal_(generator=generator).div_(parameter[0].numel() ** 0.5)
        for block in dit.transformer_blocks:
            gates: Tensor = block.scale_shift_table  # type: ignore[assignment]
            gates[2::3] = 1.0  # the branches are silent, their gates need not be


def stack_texts(texts: list[TextStates]) -> TextBatch:
    """Pads to the longest."""
    llm = nn.utils.rnn.pad_sequence([text.llm for text in texts], batch_first=True)
    lengths = torch.tensor([len(text.llm) for text in texts])
    clip = torch.stack([text.clip for text in texts])
    real = torch.arange(llm.shape[1])[None] < lengths[:, None]
    return TextBatch(llm, clip, torch.cat([real.new_ones(clip.shape[:2]), real], dim=1))


def velocity(
    dit: StepVideoDiT, latents: Tensor, condition: Tensor, timestep: Tensor, motion_score: Tensor, text: TextBatch
) -> Tensor:
    """As StepVideoDiT.forward, which takes one text length: latents [B, F, C, h, w], condition [B, C, h, w] of frame 0,
    timestep [B] in 0..1, motion score [B] -> velocity [B, F, C, h, w]."""
    frames, height, width = latents.shape[1], latents.shape[3], latents.shape[4]
    first = torch.zeros_like(latents)
    first[:, 0] = condition
    cos, sin = rope_tables(frames, height, width)
    tokens, modulation, embedding = dit.embed(patchify(latents, 1), patchify(first, 1), timestep, motion_score)
    context = dit.context(text.llm, text.clip)
    mask = text.real[:, None, None]
    for block in dit.transformer_blocks:
        assert isinstance(block, DiTBlock)
        tokens = _block(block, tokens, modulation, (cos, sin), context, mask)
    return unpatchify(dit.final(tokens, embedding), frames, height, width, 1)


def _block(
    block: DiTBlock, x: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], context: Tensor, mask: Tensor
) -> Tensor:
    """DiTBlock.forward with a mask on the text, and with operators that have a gradient."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table + modulation).split(1, dim=1)
    wide = block.attn1.wqkv(modulate(block.norm1(x), scale1, shift1)).unflatten(-1, (-1, 3 * HEAD_DIM))
    q, k, v = (part.transpose(1, 2) for part in wide.split(HEAD_DIM, dim=-1))
    mixed = F.scaled_dot_product_attention(
        rotate(block.attn1.q_norm(q), *rope), rotate(block.attn1.k_norm(k), *rope), v
    )
    x = x + gate1 * block.attn1.wo(mixed.transpose(1, 2).flatten(2))
    keys, values = block.attn2.keys_values(context)
    queries = block.attn2.q_norm(block.attn2.wq(x).unflatten(-1, (-1, HEAD_DIM))).transpose(1, 2)
    read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    x = x + block.attn2.wo(read.transpose(1, 2).flatten(2))
    return x + gate2 * block.ff(modulate(block.norm2(x), scale2, shift2))  # type: ignore[no-any-return]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, N, 128] by tables [N, 128]: channel i of each part pairs with i + half of the part.

    The model's own goes through ONNX's operator, which has no gradient.
    """
    halves = [part.chunk(2, dim=-1) for part in x.split(ROPE_SPLIT, dim=-1)]
    turned = torch.cat([torch.cat([-second, first], dim=-1) for first, second in halves], dim=-1)
    return x * cos + turned * sin
