"""The networks of perf.full_size: random weights on a GPU, plain and fused, each as a function of nothing.

Every maker takes its weights when it is called the first time and keeps them for the other ways of running them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from stepvideo_kernels.choice import Target
from stepvideo_kernels.kernel_spec import FP8_MAX
from stepvideo_serve.dit.blocks import DiTBlock
from stepvideo_serve.dit.config import DiTConfig
from stepvideo_serve.dit.graphs import (
    ContextGraph,
    CrossGraph,
    EmbedGraph,
    FinalGraph,
    block_spec,
    context_spec,
    cross_spec,
    embed_spec,
    final_spec,
)
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.dit.velocity import DiTVelocity
from stepvideo_serve.engine.runner import EagerRunner
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.fused.choose import apply_ops, choose_ops, ops_of
from stepvideo_serve.geometry import LATENTS_PER_CHUNK, VideoGeometry
from stepvideo_serve.planning.model_size import PUBLISHED
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS, TextStates
from stepvideo_serve.text.step_llm import StepLLM
from stepvideo_serve.vae.model import VideoDecoder, VideoEncoder

VIDEO = VideoGeometry(102, 544, 992)
DTYPE = "bfloat16"
AMAX = 6.0  # of queries, keys and values of such weights
Graphs = list[tuple[EngineSpec, nn.Module]]
Run = Callable[[], Sequence[Tensor]]
Maker = Callable[["FusedWay | None"], Run]


@dataclass(frozen=True)
class FusedWay:
    """As an engine of this precision for this target has its kernels; linear layers stay in bf16."""

    precision: str
    target: Target

    def fuse(self, name: str, module: nn.Module) -> nn.Module:
        """A copy of a graph's module with the same parameters."""
        scales = {f"attn1.{part}": AMAX / FP8_MAX for part in "qkv"}
        return apply_ops(module, name, choose_ops(self.precision, self.target, ops=ops_of(name)), scales)[0]


def step_llm(device: torch.device, layers: int) -> Maker:
    """One prompt of full length through Step-LLM."""
    config = replace(PUBLISHED.llm, num_layers=layers)
    ids = torch.arange(LLM_MAX_TOKENS, device=device)[None] * 7 % config.vocab_size
    return _module_maker("step_llm", lambda: StepLLM(config), device, (ids,))


def encoder(device: torch.device) -> Maker:
    """One image through the Video-VAE's encoder."""
    pixels = torch.rand(1, 1, 3, VIDEO.height, VIDEO.width, device=device, dtype=torch.bfloat16)
    return _module_maker("vae_encoder", lambda: VideoEncoder(PUBLISHED.vae), device, (pixels,))


def decoder(device: torch.device) -> Maker:
    """One chunk through its decoder."""
    shape = (1, LATENTS_PER_CHUNK, PUBLISHED.vae.z_channels, VIDEO.latent_height, VIDEO.latent_width)
    latents = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return _module_maker("vae_decoder", lambda: VideoDecoder(PUBLISHED.vae), device, (latents,))


def _module_maker(name: str, build: Callable[[], nn.Module], device: torch.device, inputs: tuple[Tensor, ...]) -> Maker:
    @cache
    def plain() -> nn.Module:
        return _on(device, build)

    def make(way: FusedWay | None) -> Run:
        module = way.fuse(name, plain()).to(device) if way else plain()

        def run() -> Sequence[Tensor]:
            returned = module(*inputs)
            return (returned,) if isinstance(returned, Tensor) else tuple(returned)

        return run

    return make


def dit_step(device: torch.device, layers: int, config: DiTConfig | None = None) -> Maker:
    """A guided step: a prompt of full length, and a negative one of half of it. `config`: a smaller network."""
    size = replace(config or PUBLISHED.dit, num_layers=layers)
    shape = VIDEO.latent_shape(size.in_channels) if config is None else (6, size.in_channels, 4, 6)

    @cache
    def plain() -> Graphs:
        return plain_graphs(size, device)

    def make(way: FusedWay | None) -> Run:
        graphs = plain() if way is None else [(spec, way.fuse(spec.name, module)) for spec, module in plain()]
        return guided_step(graphs, size, shape, device)

    return make


def plain_graphs(config: DiTConfig, device: torch.device) -> Graphs:
    """The DiT's graphs; blocks are made one at a time."""
    model = _on(device, lambda: StepVideoDiT(replace(config, num_layers=0)))
    assert isinstance(model, StepVideoDiT)
    blocks = [_random_block(config.width, device) for _ in range(config.num_layers)]
    return [
        (context_spec(config, DTYPE), ContextGraph(model)),
        (embed_spec(config, DTYPE), EmbedGraph(model)),
        (final_spec(config, DTYPE), FinalGraph(model)),
        *((cross_spec(config, DTYPE, i), CrossGraph(block)) for i, block in enumerate(blocks)),
        *((block_spec(config, DTYPE, i), block) for i, block in enumerate(blocks)),
    ]


def guided_step(graphs: Graphs, config: DiTConfig, shape: tuple[int, ...], device: torch.device) -> Run:
    """Both velocities [F, C, h, w] at a time in the middle."""
    runners = {spec.name: EagerRunner(spec, module, device) for spec, module in graphs}
    velocity = DiTVelocity(runners, config, torch.bfloat16, device)
    random = torch.Generator().manual_seed(1)
    texts = tuple(
        TextStates(
            torch.randn(tokens, config.llm_channels, generator=random),
            torch.randn(CLIP_TOKENS, config.clip_channels, generator=random),
        )
        for tokens in (LLM_MAX_TOKENS, LLM_MAX_TOKENS // 2)
    )
    latents, condition = torch.randn(shape, generator=random), torch.randn(shape[1:], generator=random)
    request = velocity.prepare(shape, condition, 5.0, texts)
    return lambda: velocity(latents, 0.37, request)


def _random_block(width: int, device: torch.device) -> DiTBlock:
    block = _on(device, lambda: DiTBlock(width))
    assert isinstance(block, DiTBlock)
    nn.init.normal_(block.scale_shift_table, std=0.1)
    return block


def _on(device: torch.device, build: Callable[[], nn.Module]) -> nn.Module:
    """The module with random weights in bf16, for inference."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return build().requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(default)
