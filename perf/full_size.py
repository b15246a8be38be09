"""Every stage of the full-size model on one GPU in torch, in bf16: as it is, and with this project's fused kernels.

    PYTHONPATH=kernels:. python -m perf.full_size [--layers 48] [--kernels build/kernels] [--repeats 3] [--json FILE]

No checkpoint is needed: weights are random, and each stage's are freed before the next one's are made (59 GB for the
DiT). One request is 102 frames of 544x992 in 50 steps with guidance, texts of full length. Printed are seconds, FLOP/s
and peak memory of each stage, how far the fused results are from the plain ones (root mean square, over that of the
result), and what the planner predicts for this GPU (`make layouts`). With fewer layers than 48 Step-LLM and the DiT are
shallower, and their seconds are scaled.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from perf.full_size_networks import FusedWay, decoder, dit_step, encoder, step_llm
from stepvideo_kernels.choice import Target
from stepvideo_kernels.launch.on_cuda import BuiltOperators, sm_of
from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.memory.sizes import Workload
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.planning.cost import predict, step_flops
from stepvideo_serve.planning.gpus import GPUS
from stepvideo_serve.planning.model_size import PUBLISHED, model_size, workload

STEPS = 50
WARM_UPS = 1
SINGLE = Layout.parse("single")
Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Measured:
    """One stage, done in one way. seconds: median, of the full depth; off: see the module's docstring, None for the
    plain one."""

    stage: str
    way: str
    seconds: float
    tflops: float
    peak_gib: float
    off: float | None


def main() -> int:
    options = _parser().parse_args()
    if not torch.cuda.is_available():
        print("error: perf.full_size needs an NVIDIA GPU, torch sees none.", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    work = workload(PUBLISHED, VideoGeometry(102, 544, 992), STEPS)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: {work.tokens} tokens, {STEPS} steps")
    print(f"{'stage':<14} {'way':<22} {'seconds':>9} {'TFLOP/s':>8} {'GiB':>6} {'off':>8}")
    results = []
    try:
        BuiltOperators(options.kernels).register()
        for one in measure(device, work, options.layers, options.repeats):
            print(_line(one), flush=True)
            results.append(one)
    except StepVideoError as error:  # no kernels for this GPU, or no cuda-bindings
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(summary(results, work, torch.cuda.get_device_name(device))))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n", encoding="utf-8")
    return 0


@torch.inference_mode()
def measure(device: torch.device, work: Workload, layers: int, repeats: int) -> Iterator[Measured]:
    """Every stage in every way, one network in memory at a time."""
    target = Target(sm_of(device), "tensorrt")
    bf16, fp8 = FusedWay("bf16", target), FusedWay("fp8", target)
    depth = PUBLISHED.dit.num_layers / layers
    step = sum(step_flops(model_size(PUBLISHED), SINGLE, work).values())
    stages: dict[str, tuple[float, float, Callable[[FusedWay | None], Run], dict[str, FusedWay]]] = {
        "step_llm": (work.llm_flops / 2, depth, step_llm(device, layers), {"fused": bf16}),
        "vae_encoder": (work.encode_flops, 1.0, encoder(device), {"fused": bf16}),
        "vae_decoder": (work.chunk_flops, 1.0, decoder(device), {"fused": bf16}),
        "dit step": (step, depth, dit_step(device, layers), {"fused": bf16, "fused, FP8 attention": fp8}),
    }
    while stages:
        stage = next(iter(stages))
        flops, scale, make, fused = stages.pop(stage)
        plain: Sequence[Tensor] = ()
        for name, way in {"torch": None, **fused}.items():
            run = make(way)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            result = [tensor.float().cpu() for tensor in run()]
            plain = plain or result
            seconds = statistics.median(_seconds(run) for _ in range(repeats)) * scale
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            off = max(_difference(*pair) for pair in zip(plain, result, strict=True)) if way else None
            yield Measured(stage, name, seconds, flops / seconds / 1e12, peak, off)
            del run
        del make  # and with it the weights


def summary(results: Sequence[Measured], work: Workload, gpu_name: str) -> list[str]:
    """Seconds of a request, by way of the DiT, beside the planner's for this GPU."""
    best = {one.stage: one.seconds for one in sorted(results, key=lambda one: -one.seconds)}
    around = 2 * best["step_llm"] + best["vae_encoder"] + work.chunks * best["vae_decoder"]
    lines = [f"text, image and {work.chunks} chunks, the faster way of each: {around:.2f} s"]
    lines += [
        f"a request of {work.steps} steps, {one.way}: {around + work.steps * one.seconds:.0f} s"
        for one in results
        if one.stage == "dit step"
    ]
    known = [gpu for name, gpu in GPUS.items() if name in gpu_name]
    if known:
        planned = predict(model_size(PUBLISHED), SINGLE, work, known[0], "bf16")
        lines.append(
            f"the planner for an {known[0].name} in bf16: {planned.step.total:.2f} s a step, {planned.request_s:.0f} s"
        )
    return lines


def _line(one: Measured) -> str:
    off = "" if one.off is None else f"{one.off:.1e}"
    return f"{one.stage:<14} {one.way:<22} {one.seconds:>9.4f} {one.tflops:>8.0f} {one.peak_gib:>6.1f} {off:>8}"


def _seconds(run: Run) -> float:
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began_s


def _difference(plain: Tensor, fused: Tensor) -> float:
    return float((plain - fused).square().mean().sqrt() / plain.square().mean().sqrt())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.full_size", description="The full-size model on one GPU.")
    parser.add_argument("--layers", type=int, default=PUBLISHED.dit.num_layers, help="of the DiT and of Step-LLM")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kernels", type=Path, default=Path("build/kernels"), help="the folder of `make kernels`")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
