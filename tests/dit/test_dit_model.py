"""The parts of the DiT against plain formulas."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stepvideo_serve.dit.blocks import CrossAttention, HeadNorm, SelfAttention
from stepvideo_serve.dit.embeddings import ConditionEmbedding, sinusoid_frequencies, sinusoidal_embedding
from stepvideo_serve.dit.model import StepVideoDiT, patchify, unpatchify
from stepvideo_serve.dit.rope import rope_tables
from stepvideo_serve.text.states import CLIP_TOKENS
from tests.mini import MINI, normal, relative_error, with_random_weights

HEADS, HEAD = 3, 128
WIDTH = HEADS * HEAD


@pytest.mark.parametrize("patch", [1, 2])
def test_unpatchify_undoes_patchify(patch: int) -> None:
    """On the way out, rows and columns of a patch come before its channels, on the way in after."""
    frames, channels, height, width = 3, 5, 4, 6
    latents = normal(2, frames, channels, height, width)
    tokens = patchify(latents, patch)
    assert tokens.shape == (2, frames * height * width // patch**2, channels * patch**2)
    as_output = tokens.unflatten(-1, (channels, patch, patch)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(as_output, frames, height // patch, width // patch, patch), latents)


@pytest.mark.parametrize("patch", [1, 2])
def test_patch_embedding_is_a_strided_convolution(patch: int) -> None:
    config = replace(MINI.dit, patch_size=patch)
    dit = with_random_weights(StepVideoDiT(config))
    latents, condition = (normal(1, 2, config.in_channels, 4, 6, seed=seed) for seed in (1, 2))
    scalars = torch.tensor([0.5]), torch.tensor([5.0])
    tokens, _, _ = dit.embed(patchify(latents, patch), patchify(condition, patch), *scalars)
    both = torch.cat([latents, condition], dim=2)[0]
    expected = F.conv2d(both, dit.pos_embed.proj.weight, dit.pos_embed.proj.bias, stride=patch)
    assert relative_error(tokens[0], expected.flatten(2).transpose(1, 2).flatten(0, 1)) < 1e-6


def test_self_attention_is_interleaved_per_head() -> None:
    """wqkv gives q, k and v of head 0, then of head 1, and so on."""
    layer = with_random_weights(SelfAttention(WIDTH))
    x = normal(1, 6, WIDTH)
    cos, sin = rope_tables(1, 1, 6)
    heads = []
    for head in range(HEADS):
        rows = layer.wqkv.weight[head * 3 * HEAD : (head + 1) * 3 * HEAD]
        q, k, v = (x[0] @ part.T for part in rows.split(HEAD))
        q, k = (turned(normed(t, norm.weight), cos, sin) for t, norm in ((q, layer.q_norm), (k, layer.k_norm)))
        heads.append(torch.softmax(q @ k.T / math.sqrt(HEAD), dim=-1) @ v)
    expected = torch.cat(heads, dim=-1) @ layer.wo.weight.T
    assert relative_error(layer(x, cos, sin)[0], expected) < 1e-5


def test_cross_attention_is_interleaved_per_head() -> None:
    """wkv gives k and v of head 0, then of head 1; queries are in the order of the heads, nothing is rotated."""
    layer = with_random_weights(CrossAttention(WIDTH))
    x, context = normal(1, 4, WIDTH), normal(1, 7, WIDTH, seed=1)
    heads = []
    for head in range(HEADS):
        rows = layer.wkv.weight[head * 2 * HEAD : (head + 1) * 2 * HEAD]
        k, v = (context[0] @ part.T for part in rows.split(HEAD))
        q = x[0] @ layer.wq.weight[head * HEAD : (head + 1) * HEAD].T
        q, k = normed(q, layer.q_norm.weight), normed(k, layer.k_norm.weight)
        heads.append(torch.softmax(q @ k.T / math.sqrt(HEAD), dim=-1) @ v)
    expected = torch.cat(heads, dim=-1) @ layer.wo.weight.T
    assert relative_error(layer(x, *layer.keys_values(context))[0], expected) < 1e-5


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation as complex numbers, part by part."""
    parts = []
    for values, c, s in zip(*(t.split((64, 32, 32), dim=-1) for t in (x, cos, sin)), strict=True):
        half = values.shape[-1] // 2
        angle = torch.complex(c[..., :half].contiguous(), s[..., :half].contiguous())
        pair = torch.complex(values[..., :half].contiguous(), values[..., half:].contiguous()) * angle
        parts += [pair.real, pair.imag]
    return torch.cat(parts, dim=-1)


def test_head_norm_is_computed_in_fp32() -> None:
    norm = HeadNorm().bfloat16()
    x = 300 * normal(64, HEAD).bfloat16()
    assert torch.equal(norm(x), normed(x.float(), torch.ones(HEAD)).bfloat16())


def test_sinusoids_are_cosines_then_sines() -> None:
    embedding = sinusoidal_embedding(torch.tensor([0.0, 3.0]), sinusoid_frequencies(4))
    angles = [3.0, 3.0 * 10000**-0.5]
    expected = [[1.0, 1.0, 0.0, 0.0], [*map(math.cos, angles), *map(math.sin, angles)]]
    assert torch.allclose(embedding, torch.tensor(expected), atol=1e-6)


def test_timesteps_are_scaled_in_fp32() -> None:
    """0.7903 * 1000 has no bf16 value nearer than 790.3 +- 2: the scaling must come before any rounding."""
    layer = with_random_weights(ConditionEmbedding(WIDTH))
    motion = torch.tensor([5.0])
    exact = layer.timestep_embedder(torch.tensor([790.3])) + layer.motion_score_embedder(motion)
    assert relative_error(layer(torch.tensor([0.7903]), motion), exact) < 1e-4
    half = with_random_weights(ConditionEmbedding(WIDTH)).bfloat16()
    moved = layer(torch.tensor([0.788]), motion)
    assert relative_error(half(torch.tensor([0.7903]), motion), exact) < 0.25 * relative_error(moved, exact)


@pytest.fixture(scope="module")
def dit() -> StepVideoDiT:
    return with_random_weights(StepVideoDiT(MINI.dit))


def test_the_context_is_clip_then_llm(dit: StepVideoDiT) -> None:
    llm, clip = normal(1, 9, MINI.dit.llm_channels), normal(1, CLIP_TOKENS, MINI.dit.clip_channels, seed=1)
    context = dit.context(llm, clip)
    assert context.shape == (1, CLIP_TOKENS + 9, MINI.dit.width)
    other_llm, other_clip = dit.context(normal(1, 9, MINI.dit.llm_channels, seed=2), clip), dit.context(llm, 2 * clip)
    assert torch.equal(other_llm[:, :CLIP_TOKENS], context[:, :CLIP_TOKENS])
    assert torch.equal(other_clip[:, CLIP_TOKENS:], context[:, CLIP_TOKENS:])
    assert not torch.allclose(other_llm[:, CLIP_TOKENS:], context[:, CLIP_TOKENS:])
    assert not torch.allclose(other_clip[:, :CLIP_TOKENS], context[:, :CLIP_TOKENS])


@pytest.mark.parametrize("changed", range(6))
def test_every_input_matters(dit: StepVideoDiT, changed: int) -> None:
    latents, condition = normal(1, 2, 4, 4, 6), torch.zeros(1, 2, 4, 4, 6)
    condition[:, 0] = normal(4, 4, 6, seed=1)
    texts = normal(1, 5, MINI.dit.llm_channels, seed=2), normal(1, CLIP_TOKENS, MINI.dit.clip_channels, seed=3)
    inputs = [latents, condition, torch.tensor([0.3]), torch.tensor([5.0]), *texts]
    before = dit(*inputs)
    inputs[changed] = inputs[changed] * 1.5 + 0.1 * normal(*inputs[changed].shape, seed=4)
    assert relative_error(dit(*inputs), before) > 1e-2


def test_samples_of_a_batch_do_not_mix(dit: StepVideoDiT) -> None:
    def batch(size: int) -> list[Tensor]:
        shapes = [(2, 4, 4, 6), (2, 4, 4, 6), (), (), (5, MINI.dit.llm_channels), (CLIP_TOKENS, MINI.dit.clip_channels)]
        samples = [[normal(*shape, seed=10 * i + n) for n in range(size)] for i, shape in enumerate(shapes)]
        return [torch.stack(values) for values in samples]

    both = dit(*batch(2))
    assert relative_error(dit(*batch(1))[0], both[0]) < 1e-5
