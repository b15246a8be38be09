"""One guided DiT step of a compute-bound model, as a share of this machine's own matrix-multiply rate.

    python -m perf.dit_step [--threads N] [--repeats 5]

The model has width 1024, 8 heads, 4 layers; the video 1,944 tokens; fp32; two guidance branches of different text
length. Each repeat multiplies large matrices for half a second before and after the step, so that both see the same
machine, and shares are medians over the repeats. "of torch" compares with torch's multiplication (MKL), the fastest
here; "of its own" with that of the library that runs the step, which for ONNX Runtime is its MLAS.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from export.graphs.writer import write_graph
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
from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.engine.ort import OrtRunner
from stepvideo_serve.engine.runner import EagerRunner, EngineRunner
from stepvideo_serve.engine.spec import EngineSpec, TensorSpec
from stepvideo_serve.text.states import CLIP_TOKENS, TextStates

CONFIG = DiTConfig(
    num_heads=8, num_layers=4, in_channels=16, out_channels=16, patch_size=1, llm_channels=1024, clip_channels=256
)
LATENTS = (9, 16, 12, 18)
LLM_TOKENS = (120, 48)
MATRIX = 2048
MATMUL_S = 0.5
MATMUL = EngineSpec(
    "matmul",
    (TensorSpec("input", "float32", (MATRIX, MATRIX)),),
    (TensorSpec("output", "float32", (MATRIX, MATRIX)),),
    {},
)
Work = Callable[[], object]
GOAL = 0.85


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.dit_step", description="DiT step against matrix multiply.")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    graphs = medium_graphs()
    flops = step_flops()
    print(f"{flops / 1e9:.0f} GFLOP a step, {arguments.threads} threads, median of {arguments.repeats}")
    print("GFLOP/s: of the step, and of a large matrix multiplication in torch and in the backend itself")
    print(f"{'backend':<8} {'s/step':>7} {'step':>7} {'torch':>7} {'own':>7}  of torch (goal {GOAL:.0%})  of its own")
    linear, left = nn.Linear(MATRIX, MATRIX, bias=False).requires_grad_(False), torch.randn(MATRIX, MATRIX)
    eager = {spec.name: EagerRunner(spec, module) for spec, module in graphs}
    report("eager", eager, flops, arguments.repeats, lambda: linear(left), lambda: linear(left))
    with tempfile.TemporaryDirectory() as folder:
        print("exporting to ONNX ...", file=sys.stderr)
        runners = {spec.name: _ort(spec, module, Path(folder), arguments.threads) for spec, module in graphs}
        own = _ort(MATMUL, linear, Path(folder), arguments.threads)
        report("ort", runners, flops, arguments.repeats, lambda: linear(left), lambda: own(input=left))
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


def report(
    name: str, runners: Mapping[str, EngineRunner], flops: float, repeats: int, torch_multiply: Work, own_multiply: Work
) -> None:
    """Times the step between matrix multiplications of torch and of the backend, and prints medians."""
    dit = DiTVelocity(runners, CONFIG, torch.float32)
    latents, condition = torch.randn(LATENTS), torch.randn(LATENTS[1:])
    texts = tuple(TextStates(torch.randn(n, 1024), torch.randn(CLIP_TOKENS, 256)) for n in LLM_TOKENS)
    request = dit.prepare(LATENTS, condition, 5.0, texts)

    def step() -> object:
        return dit(latents, 0.37, request)

    for warm_up in (step, torch_multiply, own_multiply):
        warm_up()
    rows = []
    for _ in range(repeats):
        before = _matmul_rate(torch_multiply), _matmul_rate(own_multiply)
        step_s = _seconds(step)
        after = _matmul_rate(torch_multiply), _matmul_rate(own_multiply)
        torch_rate, own_rate = ((first + last) / 2 for first, last in zip(before, after, strict=True))
        rate = flops / step_s
        rows.append((step_s, rate / 1e9, torch_rate / 1e9, own_rate / 1e9, rate / torch_rate, rate / own_rate))
    medians = map(statistics.median, zip(*rows, strict=True))
    print("{:<8} {:>7.3f} {:>7.1f} {:>7.1f} {:>7.1f} {:>20.1%} {:>11.1%}".format(name, *medians))


def _matmul_rate(multiply: Work) -> float:
    """FLOP/s over at least MATMUL_S seconds."""
    began_s, count = time.perf_counter(), 0
    while time.perf_counter() - began_s < MATMUL_S:
        multiply()
        count += 1
    return count * 2 * MATRIX**3 / (time.perf_counter() - began_s)


def _seconds(work: Work) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _ort(spec: EngineSpec, module: nn.Module, folder: Path, threads: int) -> OrtRunner:
    path = folder / f"{spec.name}.onnx"
    write_graph(module, spec, path)
    return OrtRunner(spec, path, threads)


if __name__ == "__main__":
    sys.exit(main())
