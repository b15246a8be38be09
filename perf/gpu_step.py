"""One guided step of the full-size DiT on one GPU in bf16: in plain torch, and with this project's fused kernels.

    PYTHONPATH=kernels:. python -m perf.gpu_step [--layers 48] [--kernels build/kernels] [--repeats 3] [--json FILE]

No checkpoint is needed: weights are random, 59 GB of them with 48 layers. The video is 102 frames of 544x992 by default
(37,944 tokens). Printed are seconds per step, FLOP/s, peak memory,
and how far the velocities of each guidance branch are apart (root mean square, over that of the velocity).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.ops import apply_ops, choose_ops, ops_of
from stepvideo_kernels.kernel_spec import FP8_MAX
from stepvideo_kernels.on_cuda import BuiltOperators
from stepvideo_kernels.ops import Target
from stepvideo_kernels.tensors import sm_of
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
from stepvideo_serve.engine.eager import EagerRunner
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.text.states import CLIP_TOKENS, LLM_MAX_TOKENS, TextStates

FULL_SIZE = DiTConfig(
    num_heads=48, num_layers=48, in_channels=64, out_channels=64, patch_size=1, llm_channels=6144, clip_channels=1024
)
DTYPE = "bfloat16"
AMAX = 6.0  # of queries, keys and values of such weights
Graphs = list[tuple[EngineSpec, nn.Module]]


def main() -> int:
    options = _parser().parse_args()
    if not torch.cuda.is_available():
        print("error: perf.gpu_step needs an NVIDIA GPU, torch sees none.", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    config = replace(FULL_SIZE, num_layers=options.layers)
    video = VideoGeometry(options.num_frames, options.height, options.width)
    shape = video.latent_shape(config.in_channels)
    print(f"{torch.cuda.get_device_name(device)}: {shape[0] * shape[2] * shape[3]} tokens, {options.layers} layers")
    BuiltOperators(options.kernels).register()
    graphs = plain_graphs(config, device)
    target = Target(sm_of(device), "tensorrt")
    ways = {
        "torch": graphs,
        "fused": fused_graphs(graphs, "bf16", target),
        "fused, FP8 attention": fused_graphs(graphs, "fp8", target),
    }
    flops = step_flops(config, shape)
    results: dict[str, Any] = {"layers": options.layers, "tokens": shape[0] * shape[2] * shape[3], "flops": flops}
    outputs = {}
    print(f"{'':<20} {'s/step':>8} {'TFLOP/s':>8} {'GiB':>6}   of {flops / 1e15:.2f} PFLOP a step")
    for name, way in ways.items():
        torch.cuda.reset_peak_memory_stats(device)
        step = guided_step(way, config, shape, device)
        outputs[name] = step()
        seconds = statistics.median(_seconds(step) for _ in range(options.repeats))
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"{name:<20} {seconds:>8.3f} {flops / seconds / 1e12:>8.1f} {peak:>6.1f}", flush=True)
        results[name] = {"seconds": seconds, "peak_gib": peak}
    for name in list(ways)[1:]:
        results[name]["difference"] = [_difference(*pair) for pair in zip(outputs["torch"], outputs[name], strict=True)]
        print(f"{name}: off torch's velocity by", *(f"{off:.1e}" for off in results[name]["difference"]))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def plain_graphs(config: DiTConfig, device: torch.device) -> Graphs:
    """The DiT's graphs with random weights, made on the GPU a block at a time."""
    torch.manual_seed(0)
    with torch.device(device):
        model = StepVideoDiT(replace(config, num_layers=0)).to(torch.bfloat16)
        blocks = [_random_block(config.width) for _ in range(config.num_layers)]
    model.requires_grad_(False).eval()
    return [
        (context_spec(config, DTYPE), ContextGraph(model)),
        (embed_spec(config, DTYPE), EmbedGraph(model)),
        (final_spec(config, DTYPE), FinalGraph(model)),
        *((cross_spec(config, DTYPE, i), CrossGraph(block)) for i, block in enumerate(blocks)),
        *((block_spec(config, DTYPE, i), block) for i, block in enumerate(blocks)),
    ]


def _random_block(width: int) -> DiTBlock:
    block = DiTBlock(width).to(torch.bfloat16)
    nn.init.normal_(block.scale_shift_table, std=0.1)
    return block.requires_grad_(False).eval()


def fused_graphs(graphs: Graphs, precision: str, target: Target) -> Graphs:
    """The same parameters, with the kernels in place of what they replace in an engine of this precision; linear layers
    stay in bf16."""
    scales = {f"attn1.{name}": AMAX / FP8_MAX for name in "qkv"}
    fused = []
    for spec, module in graphs:
        choices = choose_ops(precision, target, "plugin", ops=ops_of(spec.name))
        fused.append((spec, apply_ops(module, spec.name, choices, scales)[0]))
    return fused


def guided_step(
    graphs: Graphs, config: DiTConfig, shape: tuple[int, ...], device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    """A step with a long prompt and the negative one, as a function of nothing."""
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


def step_flops(config: DiTConfig, shape: tuple[int, ...]) -> float:
    """Multiplications and additions of the matrix products and attentions of both branches."""
    tokens, width = shape[0] * shape[2] * shape[3], config.width
    linears = 2 * tokens * width * width * (3 + 1 + 1 + 1 + 8)
    texts = (LLM_MAX_TOKENS, LLM_MAX_TOKENS // 2)
    attentions = [4 * tokens * width * (tokens + CLIP_TOKENS + text) for text in texts]
    return float(config.num_layers * sum(linears + attention for attention in attentions))


def _seconds(step: Callable[[], object]) -> float:
    """Velocities come back to the CPU, so that the GPU is done at the end."""
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    step()
    return time.perf_counter() - began_s


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt() / one.square().mean().sqrt())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.gpu_step", description="One full-size DiT step on a GPU.")
    parser.add_argument("--layers", type=int, default=FULL_SIZE.num_layers)
    parser.add_argument("--num-frames", type=int, default=102)
    parser.add_argument("--height", type=int, default=544)
    parser.add_argument("--width", type=int, default=992)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kernels", type=Path, default=Path("build/kernels"), help="the folder of `make kernels`")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
