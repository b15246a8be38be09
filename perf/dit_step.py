"""One guided DiT step of a compute-bound model, as a share of this machine's own matrix-multiply rate.

    python -m perf.dit_step [--threads 2] [--repeats 5]

The model has width 1024, 8 heads, 4 layers; the video 1,944 tokens; fp32; two guidance branches of different text
length. Each repeat times a large matrix multiplication before the step, so that both see the same machine.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from export.to_onnx import write_graph
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
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.runner import EngineRunner
from stepvideo_serve.engine.spec import EngineSpec
from stepvideo_serve.text.states import CLIP_TOKENS, TextStates

CONFIG = DiTConfig(
    num_heads=8, num_layers=4, in_channels=16, out_channels=16, patch_size=1, llm_channels=1024, clip_channels=256
)
LATENTS = (9, 16, 12, 18)
LLM_TOKENS = (120, 48)
MATRIX = 2048
GOAL = 0.85


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.dit_step", description="DiT step against matrix multiply.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    graphs = medium_graphs()
    flops = step_flops()
    print(f"{flops / 1e9:.0f} GFLOP a step, {arguments.threads} threads, median of {arguments.repeats}")
    print(f"{'backend':<10} {'s/step':>8} {'GFLOP/s':>9} {'matmul':>9} {'share':>7}   goal {GOAL:.0%}")
    eager = {spec.name: EagerRunner(spec, module) for spec, module in graphs}
    report("eager", eager, flops, arguments.repeats)
    with tempfile.TemporaryDirectory() as folder:
        print("exporting to ONNX ...", file=sys.stderr)
        runners = {spec.name: _ort(spec, module, Path(folder), arguments.threads) for spec, module in graphs}
        report("ort", runners, flops, arguments.repeats)
    return 0


def medium_graphs() -> list[tuple[EngineSpec, nn.Module]]:
    """The DiT's graphs with random weights of the usual scale."""
    torch.manual_seed(0)
    model = StepVideoDiT(CONFIG).requires_grad_(False).eval()
    blocks = [block for block in model.transformer_blocks if isinstance(block, DiTBlock)]
    return [
        (context_spec(CONFIG, "float32"), ContextGraph(model)),
        (embed_spec(CONFIG, "float32"), EmbedGraph(model)),
        (final_spec(CONFIG, "float32"), FinalGraph(model)),
        *((cross_spec(CONFIG, "float32", i), CrossGraph(block)) for i, block in enumerate(blocks)),
        *((block_spec(CONFIG, "float32", i), block) for i, block in enumerate(blocks)),
    ]


def step_flops() -> float:
    """Multiplications and additions of the matrix products and attentions of one step, two branches."""
    tokens, width = LATENTS[0] * LATENTS[2] * LATENTS[3], CONFIG.width
    linears = 2 * tokens * width * width * (3 + 1 + 1 + 1 + 8)
    total = 0.0
    for llm in LLM_TOKENS:
        attention = 4 * tokens * width * (tokens + CLIP_TOKENS + llm)
        total += CONFIG.num_layers * (linears + attention)
    return total


def report(name: str, runners: Mapping[str, EngineRunner], flops: float, repeats: int) -> None:
    """Times the step and a matrix multiplication in turn and prints medians."""
    dit = DiTVelocity(runners, CONFIG, torch.float32)
    latents, condition = torch.randn(LATENTS), torch.randn(LATENTS[1:])
    texts = tuple(TextStates(torch.randn(n, 1024), torch.randn(CLIP_TOKENS, 256)) for n in LLM_TOKENS)
    request = dit.prepare(LATENTS, condition, 5.0, texts)
    left, right = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)

    def step() -> tuple[Tensor, ...]:
        return dit(latents, 0.37, request)

    def multiply() -> Tensor:
        return left @ right

    for warm_up in (step, multiply):
        warm_up()
    pairs = [(_seconds(multiply), _seconds(step)) for _ in range(repeats)]
    multiply_s, step_s = (sorted(column)[repeats // 2] for column in zip(*pairs, strict=True))
    rate, matmul_rate = flops / step_s, 2 * MATRIX**3 / multiply_s
    print(f"{name:<10} {step_s:>8.3f} {rate / 1e9:>9.1f} {matmul_rate / 1e9:>9.1f} {rate / matmul_rate:>7.1%}")


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _ort(spec: EngineSpec, module: nn.Module, folder: Path, threads: int) -> OrtRunner:
    path = folder / f"{spec.name}.onnx"
    write_graph(module, spec, path)
    return OrtRunner(spec, path, threads)


if __name__ == "__main__":
    sys.exit(main())
