"""What serving costs: the same request in this process and through the real server, in pairs, in one run.

    python -m perf.serving_overhead [--config serve.toml] [--frames 34] [--height 128] [--width 192] [--steps 50]

Both sides run the same graphs with the same threads; which one goes first alternates from pair to pair. The result is
the median of the pairs' ratios with its interval. The goal is at most 3 % on a request of 5 s or more. Beside it stand
the processor seconds that each process spent on a served request: those outside `rank_process` and the encoders and
decoder are what serving itself computes.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from stepvideo_client import Client
from stepvideo_client import Result as ServedResult
from stepvideo_serve.assembly.stages import LocalStages
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer
from stepvideo_serve.pipeline.generate import Result, generate
from stepvideo_serve.request import parse_request

PROMPT = "一艘小船在平静的湖面上缓缓驶过，镜头慢慢推近。"
IMAGE = Path("client/examples/first_frame.png")
STAGES = ("text", "image", "vae_encode", "denoise", "vae_decode", "mp4", "total")
GOAL = 1.03
CONFIDENCE = 0.95


def main() -> int:
    options = _parser().parse_args()
    config = ServeConfig.load(options.config)
    print("loading the pipeline in this process, starting the server ...", file=sys.stderr)
    local = LocalStages(config)
    server = TritonServer(ServerOptions(Path("model_repository"), options.config, log=Path("build/bench-server.log")))
    rows: dict[str, list[dict[str, float]]] = {"in process": [], "served": []}
    spent: list[dict[str, float]] = []
    with server:
        server.wait_ready()
        processes = _processes(server.pid)
        with Client(server.grpc_url) as client:
            sides = {
                "in process": partial(_in_process, local, config, options),
                "served": partial(_served, client, options),
            }
            for repeat in range(options.repeats + 1):
                print(f"pair {repeat} of {options.repeats}{' (warm-up)' if repeat == 0 else ''}", file=sys.stderr)
                for side in sorted(sides, reverse=repeat % 2 == 1):
                    before = _cpu_seconds(processes)
                    seconds = sides[side]()
                    if repeat > 0:
                        rows[side].append(seconds)
                    if repeat > 0 and side == "served":
                        spent.append({name: now - before[name] for name, now in _cpu_seconds(processes).items()})
        memory = _peak_memory_mib(processes)
    _print(rows, options)
    _print_processes(spent, memory)
    return 0


def _in_process(stages: LocalStages, config: ServeConfig, options: argparse.Namespace) -> dict[str, float]:
    """Seconds by stage; "wall" is what a caller sees."""
    inputs = {
        "PROMPT": np.array([PROMPT.encode()], np.object_),
        "IMAGE": np.array([IMAGE.read_bytes()], np.object_),
        "SEED": np.array([1], np.int64),
        **{
            name: np.array([value], np.int32)
            for name, value in (
                ("NUM_FRAMES", options.frames),
                ("HEIGHT", options.height),
                ("WIDTH", options.width),
                ("STEPS", options.steps),
            )
        },
    }
    began_s = time.perf_counter()
    request = parse_request(inputs, config.limits, stages.latent_channels, config.defaults)
    for event in generate(request, stages, config.video, lambda: False):
        if isinstance(event, Result):
            return _row(event.report, time.perf_counter() - began_s)
    raise RuntimeError("the pipeline ended without a result")


def _served(client: Client, options: argparse.Namespace) -> dict[str, float]:
    began_s = time.perf_counter()
    events = client.generate(
        IMAGE,
        PROMPT,
        seed=1,
        num_frames=options.frames,
        height=options.height,
        width=options.width,
        steps=options.steps,
    )
    for event in events:
        if isinstance(event, ServedResult):
            return _row(event.report, time.perf_counter() - began_s)
    raise RuntimeError("the server ended without a result")


def _row(report: Mapping[str, object], wall_s: float) -> dict[str, float]:
    seconds, steps = report["seconds"], report["step_seconds"]
    assert isinstance(seconds, dict)
    assert isinstance(steps, list)
    return {**{k: float(v) for k, v in seconds.items()}, "step": statistics.median(steps), "wall": wall_s}


def _processes(server_pid: int) -> dict[str, psutil.Process]:
    """This process, the server and everything below it, named by what they are."""
    server = psutil.Process(server_pid)
    kinds = ("dit_denoiser", "text_encoder", "vae_encoder", "vae_decoder", "ti2v_unary", "ti2v_quote", "ti2v")
    named = {"this process and client": psutil.Process()}
    for process in (server, *server.children(recursive=True)):
        command = " ".join(process.cmdline())
        kind = next((kind for kind in ("rank_process", *kinds) if kind in command), process.name())
        named[f"{kind} ({process.pid})"] = process
    return named


def _cpu_seconds(processes: Mapping[str, psutil.Process]) -> dict[str, float]:
    return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}


def _peak_memory_mib(processes: Mapping[str, psutil.Process]) -> dict[str, float]:
    """VmHWM of each process."""
    peaks: dict[str, float] = {}
    for name, process in processes.items():
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        peaks[name] = peak_kib / 1024
    return peaks


def _print(rows: Mapping[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    print(
        f"{options.frames} frames, {options.width}x{options.height}, {options.steps} steps, median of {options.repeats}"
    )
    print(f"{'seconds':<12} {'in process':>11} {'served':>9} {'ratio':>7}")
    for stage in (*STAGES, "step", "wall"):
        inside, served = (statistics.median(row.get(stage, 0.0) for row in rows[side]) for side in rows)
        print(f"{stage:<12} {inside:>11.3f} {served:>9.3f} {served / inside if inside else float('nan'):>7.3f}")
    pairs = zip(rows["served"], rows["in process"], strict=True)
    ratios = sorted(served["wall"] / inside["wall"] for served, inside in pairs)
    middle, (low, high) = statistics.median(ratios), median_interval(ratios)
    verdict = "met" if middle <= GOAL else "missed"
    print(
        f"serving adds {middle - 1:+.1%} at the median of {len(ratios)} pairs ({low - 1:+.1%} to {high - 1:+.1%} with "
        f"{CONFIDENCE:.0%} confidence; goal: at most {GOAL - 1:.0%} on a request of 5 s or more: {verdict})"
    )


def _print_processes(spent: Sequence[Mapping[str, float]], memory: Mapping[str, float]) -> None:
    """Medians over the served requests."""
    seconds = {name: statistics.median(row[name] for row in spent) for name in memory}
    print(f"\n{'while served':<28} {'CPU s':>8} {'peak MiB':>9}")
    for name, peak in sorted(memory.items(), key=lambda item: -seconds[item[0]]):
        print(f"{name:<28} {seconds[name]:>8.2f} {peak:>9.0f}")
    computing = ("rank_process", "encoder", "decoder")
    around = sum(value for name, value in seconds.items() if not any(kind in name for kind in computing))
    print(f"around the stages: {around:.2f} CPU s, {around / sum(seconds.values()):.1%} of all")


def median_interval(ordered: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median with this confidence, whatever the distribution; the
    extremes where there are too few values for that."""
    count = len(ordered)
    below = 0.0  # probability that the median lies below the k-th smallest value, or above the k-th largest
    for k in range(count // 2):
        below += math.comb(count, k) / 2**count
        if 2 * below > 1 - confidence:
            return ordered[max(k - 1, 0)], ordered[count - max(k, 1)]
    return ordered[0], ordered[-1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.serving_overhead", description="Served against in-process.")
    parser.add_argument("--config", type=Path, default=Path("serve.toml"))
    parser.add_argument("--frames", type=int, default=34)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=10, help="pairs; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
