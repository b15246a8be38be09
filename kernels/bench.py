"""Times every kernel at full size against torch and against the GPU's peaks. Needs an NVIDIA GPU and `make kernels`.

    PYTHONPATH=kernels:. python kernels/bench.py [--kernels DIR] [--only GLOB ...] [--repeats N] [--json FILE]

What runs is the machine code that is served, launched as a plugin launches it. For each kernel: first it must be right
(error at most twice that of torch's own operations in the same precision, against fp64). Then every tiling in the
folder is timed, and what torch offers for the same work. A time is the median of CUDA-event timings of a CUDA graph, so
that the time which Python takes to launch does not count; before each run the L2 cache is overwritten, and runs
alternate between two sets of inputs.
Ends with status 1 when a kernel is wrong or cannot be launched, or there is no GPU.
"""

import argparse
import fnmatch
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.benchmarks import Case, Tensors, cases
from stepvideo_kernels.choice import builds_of
from stepvideo_kernels.hardware import GPUS, roofline
from stepvideo_kernels.kernel_spec import FullSize, KernelBuild
from stepvideo_kernels.launch.on_cuda import BuiltOperators, sm_of
from stepvideo_serve.errors import EngineError

INPUT_SETS = 2
FLUSH_BYTES = 256 << 20  # more than any L2 cache
WARM_UP_RUNS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: kernels/bench.py needs an NVIDIA GPU, torch sees none.", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    sm, full = sm_of(device), FullSize()
    print(f"{torch.cuda.get_device_name(device)} (SM {sm}), torch {torch.__version__}")
    results = []
    for case in cases(full, device):
        if any(fnmatch.fnmatch(f"{case.op}.{case.variant}", glob) for glob in options.only):
            results.append(measure(case, full, sm, options.kernels, options.repeats))
            print("\n".join(lines(results[-1])), flush=True)
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(result["wrong"] for result in results))


def measure(case: Case, full: FullSize, sm: int, folder: Path, repeats: int) -> dict[str, Any]:
    """Times of all tilings and baselines of a case in milliseconds, JSON values; `wrong` says what is not right."""
    sets = [case.inputs(torch.Generator("cuda").manual_seed(seed)) for seed in range(INPUT_SETS)]
    builds = [b for b in builds_of(case.op, full) if (b.variant, b.sm) == (case.variant, sm)]
    own, exact = case.own(sets[0]), case.exact(sets[0])
    wrong: list[str] = []
    tilings, worst = {}, {}
    for label in tilings_in(folder, f"{case.op}.{case.variant}.sm{sm}."):
        try:
            operators = BuiltOperators(folder, sm, tiling=label)
            run = launcher(case, operators)
            shares = error_shares(case.rows(poisoned_run(case, operators, sets[0])), own, exact)
            wrong += too_large(label, shares)
            worst[label] = max(shares.values())
            tilings[label] = median_ms(run, sets, repeats)
        except EngineError as error:
            wrong.append(f"{label} was not run: {error}")
        torch.cuda.empty_cache()
    chosen = next(build.tile.label for build in builds if build.chosen)
    if chosen not in tilings:
        wrong.append(f"{chosen}, which is served, must be in {folder} and run, and is not: run `make kernels`.")
    baselines: dict[str, float | str] = {}
    for name, baseline in case.baselines.items():
        try:
            baselines[name] = median_ms(baseline, sets, repeats)
        except RuntimeError as error:  # a backend that does not take these shapes, or not enough memory
            baselines[name] = f"not to be had: {str(error).splitlines()[0]}"
    return {
        "op": case.op,
        "variant": case.variant,
        "shape": builds[0].shape,
        "goal": case.goal,
        "wrong": wrong,
        "tilings_ms": tilings,
        "worst_error": worst,
        "chosen": chosen,
        "baselines_ms": baselines,
        **_against_peaks(builds[0], min(tilings.values(), default=math.inf)),
    }


def launcher(case: Case, operators: BuiltOperators) -> Callable[[Tensors], object]:
    """The case's operator in machine code."""
    return lambda given: operators(case.operator, case.operands(given), case.attributes)


def poisoned_run(case: Case, operators: BuiltOperators, given: Tensors) -> Tensors:
    """Outputs by name, NaN wherever the kernel does not write: memory may hold the results of another tiling."""
    operands = case.operands(given)
    outputs = operators(case.operator, operands, case.attributes)
    for output in outputs:
        output.view(torch.uint8).fill_(0xFF)  # NaN in bf16 and in E4M3
    operators(case.operator, operands, case.attributes, outputs)
    return dict(zip(operators.output_names(case.operator), outputs, strict=True))


def tilings_in(folder: Path, prefix: str) -> list[str]:
    """Labels of all tilings there whose names begin so, those that `make kernels` does not know included."""
    return sorted(path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.json"))


def error_shares(results: Tensors, own: Tensors, exact: Tensors) -> dict[str, float]:
    """Largest and root-mean-square error of each output's rows, as shares of what is allowed: 1 is the bound."""
    shares = {}
    for name, result in results.items():
        truth = exact[name].double()
        error, torch_error = (result.double() - truth).abs(), (own[name].double() - truth).abs()
        unit = torch.finfo(result.dtype).eps / 2
        largest = error.max() / (2 * torch_error.max() + unit * truth.abs().max())
        shares[f"largest error of {name}"] = float(largest)
        shares[f"RMS error of {name}"] = float(_rms(error) / (2 * _rms(torch_error) + unit / 8 * _rms(truth)))
    return shares


def too_large(label: str, shares: Mapping[str, float]) -> list[str]:
    """A sentence for each error above the bound, NaN included."""
    return [f"{label}: {kind} is {share:.2f} of what is allowed" for kind, share in shares.items() if not share <= 1]


def median_ms(run: Callable[[Tensors], object], sets: list[Tensors], repeats: int) -> float:
    """Milliseconds of one run on the GPU."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    graphs = [captured(run, given) for given in sets]
    times = []
    for index in range(WARM_UP_RUNS + repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graphs[index % len(graphs)].replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return statistics.median(times[WARM_UP_RUNS:])


def captured(run: Callable[[Tensors], object], given: Tensors) -> torch.cuda.CUDAGraph:
    """The run as a CUDA graph; once outside of it first, for what is loaded or chosen at the first call."""
    run(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(given)
    return graph


def lines(result: dict[str, Any]) -> list[str]:
    """The report of one case."""
    best = min(result["tilings_ms"].values(), default=math.inf)
    report = [f"\n{result['op']}.{result['variant']}  {result['shape']}  goal on an H100: {result['goal']}"]
    report += [f"  WRONG: {fault}" for fault in result["wrong"]]
    for label, time in sorted(result["tilings_ms"].items(), key=lambda pair: pair[1]):
        error = f"error {result['worst_error'][label]:.2f} of the bound"
        production = "  (production)" if label == result["chosen"] else ""
        report.append(f"  {time:9.3f} ms  ours {label}, {error}{production}")
    for name, time in result["baselines_ms"].items():
        if isinstance(time, str):
            report.append(f"  {'-':>9}     {name} {time}")
        else:
            report.append(f"  {time:9.3f} ms  {name}: ours is {time / best:.2f} times as fast")
    for name, share in result["share_of_peak"].items():
        report.append(f"  {share:9.1%}  of the data-sheet peak of an {name} ({result['limit']})")
    return report


def _against_peaks(build: KernelBuild, best_ms: float) -> dict[str, Any]:
    """Share of each peak table that may be this GPU's: several GPUs have one architecture."""
    name = torch.cuda.get_device_name()
    predictions = roofline(build.full_work, build.sm)
    here = [one for one in predictions if one.gpu in name] or predictions
    return {
        "share_of_peak": {one.gpu: one.milliseconds / best_ms for one in here},
        "limit": here[0].limit if here else f"unknown: {', '.join(gpu.name for gpu in GPUS)} are listed",
    }


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().mean().sqrt()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python kernels/bench.py", description=__doc__)
    parser.add_argument("--kernels", type=Path, default=Path("build/kernels"), help="the folder of `make kernels`")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help='e.g. "attention.*"')
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
