"""Layouts against one rank on this machine's CPU, and how long the group needs to heal.

    python -m perf.parallel [--steps 4] [--ranks 2]

Each layout runs with one thread per rank; it is compared with one rank that has as many threads, in the same run.
Bytes are the planner's; that ranks send just as many is a test. On GPUs other things decide (links, kernels).
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from export.tiny.config import TINY_DIT, TinyConfig
from export.tiny_checkpoint import write_checkpoint
from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.parallel.group import RankGroup
from stepvideo_serve.parallel.job import ResultEvent, StepEvent
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.planning.cost import exchanges
from stepvideo_serve.planning.model_size import ModelConfigs, model_size
from stepvideo_serve.request import PREVIEW_FORMATS, RequestLimits, parse_request, rank_settings
from stepvideo_serve.video.preview import LatentPreview, encode_preview

LAYOUTS = {2: ("cfg2", "tp2", "sp2"), 4: ("tp4", "sp4", "cfg2.tp2", "cfg2.sp2", "tp2.sp2")}
LATENTS = (9, 8, 12, 18)
TEXT_TOKENS = (120, 48)
RANK_FACTORY = "stepvideo_serve.serving.rank_factory:build_rank"
SIGNS_FACTORY = "perf.waiting_worker:build_worker"
FULL_SIZE_LATENTS = (18, 64, 34, 62)  # 102 frames of 544x992
SIGNS_STEPS = 20
ROUND_TRIPS = 10
IDLE_S = 10.0  # processor time is counted in units of 10 ms
PREDICTED_STEP_S = 0.97  # cfg2.sp4 in FP8, the fastest on eight H100: make layouts
ARENA_BYTES = 64 << 20
START_TIMEOUT_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.parallel", description="Layouts against one rank, on CPUs.")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ranks", type=int, choices=sorted(LAYOUTS), default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "model", TinyConfig(dit=replace(TINY_DIT, num_heads=8, num_layers=4), dit_shards=1))
        print(f"one rank with {options.ranks} threads, then layouts with one thread a rank", file=sys.stderr)
        base = seconds_per_step(folder, "single", options.ranks, options.steps)
        print(f"{'layout':<10} {'s/step':>8} {'speed-up':>9} {'MB sent per rank and step':>27}")
        print(f"{'single':<10} {base:>8.3f} {'1.00':>9} {0.0:>27.1f}")
        for layout in LAYOUTS[options.ranks]:
            seconds = seconds_per_step(folder, layout, 1, options.steps)
            print(f"{layout:<10} {seconds:>8.3f} {base / seconds:>9.2f} {predicted_mb(folder, layout):>27.1f}")
        print(
            f"\nfrom SIGKILL of a rank to the next step (layout {LAYOUTS[options.ranks][0]}): {heal(folder, options)}"
        )
        print(f"signs of life: {signs_of_life()}")
        print(f"round trip: {round_trip()}")
        print(f"preview: {preview()}")
    return 0


def make_group(folder: Path, layout: str, threads: int) -> RankGroup:
    config = folder / f"{layout}.{threads}.toml"
    model = f'[model]\ndir = "{folder / "model"}"\nengines_dir = "{folder}"\nbackend = "eager"\n'
    config.write_text(f'{model}[denoiser]\nlayout = "{layout}"\nthreads = {threads}\n')
    return RankGroup(
        RANK_FACTORY,
        {"config": str(config)},
        size=Layout.parse(layout).world_size,
        start_timeout_s=START_TIMEOUT_S,
        arena_bytes=ARENA_BYTES,
        threads_per_rank=threads,
    )


def make_job(steps: int) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Parameters and tensors of a guided job, as `dit_denoiser` hands them to its ranks."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return random.standard_normal(shape, dtype=np.float32)

    tensors = {"latents": normal(*LATENTS), "condition": normal(*LATENTS[1:])}
    for branch, tokens in zip(("positive", "negative"), TEXT_TOKENS, strict=True):
        tensors |= {f"{branch}_llm": normal(tokens, 96), f"{branch}_clip": normal(77, 64)}
    inputs = {name: np.array([value], np.object_) for name, value in (("PROMPT", b""), ("IMAGE", b"none"))}
    settings = rank_settings(parse_request(inputs, RequestLimits(), LATENTS[1]))
    params = {"kind": "denoise", "settings": {**settings, "steps": steps, "cfg_scale": 4.0}, "timeout_s": None}
    return params, tensors


def seconds_per_step(folder: Path, layout: str, threads: int, steps: int) -> float:
    """Median over the steps after the first."""
    with make_group(folder, layout, threads) as group:
        events = list(group.run(*make_job(steps + 1)))
    seconds = [event.params["seconds"] for event in events if isinstance(event, StepEvent)]
    return float(statistics.median(seconds[1:]))


def predicted_mb(folder: Path, layout: str) -> float:
    """Payload of one rank in one step; that it is what ranks send is a test (tests/parallel/test_sharded.py)."""
    size = model_size(ModelConfigs.load(folder / "model"))
    tokens = LATENTS[0] * LATENTS[2] * LATENTS[3]
    return sum(e.payload_bytes for e in exchanges(size, Layout.parse(layout), tokens, itemsize=4)) / 1e6


def waiting_ranks(size: int) -> RankGroup:
    """Ranks without a model, whose steps only wait."""
    return RankGroup(
        SIGNS_FACTORY, {}, size=size, start_timeout_s=START_TIMEOUT_S, arena_bytes=ARENA_BYTES, threads_per_rank=1
    )


def signs_of_life() -> str:
    """What the mark and the report of a step cost a rank, beside a full-size step: with a full-size latent, and with
    the velocity that an evaluated step adds where a preset forecasts."""
    latents = np.zeros(FULL_SIZE_LATENTS, np.float32)
    seconds = {}
    with waiting_ranks(2) as group:
        for names in (("latents",), ("latents", "velocity_0")):
            job = {"steps": SIGNS_STEPS, "step_s": PREDICTED_STEP_S / 2}
            *_, result = group.run(job, dict.fromkeys(names, latents))
            seconds[len(names)] = result.params["seconds"] / SIGNS_STEPS
        parent, *ranks = idle_shares([os.getpid(), *group.pids])
    plain_s, preset_s = seconds[1], seconds[2]
    return (
        f"mark and report of a full-size latent ({latents.nbytes / 1e6:.1f} MB) take {plain_s * 1e3:.2f} ms a step, "
        f"{plain_s / PREDICTED_STEP_S:.2%} of a step of {PREDICTED_STEP_S} s, with an evaluated velocity of a preset "
        f"{preset_s * 1e3:.2f} ms, {preset_s / PREDICTED_STEP_S:.2%} (goal: below 1 %); idle, "
        f"the parent takes {parent:.2%} of a processor and a rank {max(ranks):.2%} (goal: below 1 %)"
    )


def round_trip() -> str:
    """What the way to the ranks and back costs a job: full-size latents, no steps."""
    latents, seconds = np.ones(FULL_SIZE_LATENTS, np.float32), []
    with waiting_ranks(1) as group:
        group.start()
        for _ in range(ROUND_TRIPS):
            began_s = time.perf_counter()
            *_, result = group.run({"steps": 0, "step_s": 0.0}, {"latents": latents})
            seconds.append(time.perf_counter() - began_s)
            assert np.array_equal(result.tensors["latents"], latents)
    return f"{latents.nbytes / 1e6:.1f} MB to a rank and back, median {statistics.median(seconds) * 1e3:.1f} ms"


def idle_shares(pids: list[int]) -> list[float]:
    """What each process takes of a processor while nothing is to be done but heartbeats."""
    processes = [psutil.Process(pid) for pid in pids]
    before_s = [cpu_s(process) for process in processes]
    time.sleep(IDLE_S)
    return [(cpu_s(process) - then_s) / IDLE_S for process, then_s in zip(processes, before_s, strict=True)]


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def preview() -> str:
    """What the preview of a step costs, in processor time of one thread: the colours of a full-size latent, which the
    leader makes in the course of a full-size step, and the file of them, which the model ti2v makes beside the next."""
    random = torch.Generator().manual_seed(0)
    render = LatentPreview(torch.randn(3, FULL_SIZE_LATENTS[1], generator=random) / 8, torch.zeros(3)).render
    latents = torch.randn(FULL_SIZE_LATENTS, generator=random)
    frames = render(latents)
    torch.set_num_threads(1)  # several wait for each other by spinning, where other work has the cores
    colours_s = median_cpu_s(partial(render, latents))
    torch.set_num_threads(usable_cores())
    said = [f"of a full-size latent takes the leader {colours_s * 1e3:.2f} ms, {share(colours_s)} (goal: below 1 %)"]
    for kind in PREVIEW_FORMATS:
        seconds = median_cpu_s(partial(encode_preview, frames, kind))
        size_kb = len(encode_preview(frames, kind)) / 1e3
        said.append(f"its {kind} takes ti2v {seconds * 1e3:.2f} ms ({share(seconds)}) and has {size_kb:.0f} kB")
    return "; ".join(said)


def median_cpu_s(work: Callable[[], object]) -> float:
    """Of SIGNS_STEPS times, the processor time of this process."""
    seconds = []
    for _ in range(SIGNS_STEPS):
        began_s = time.process_time()
        work()
        seconds.append(time.process_time() - began_s)
    return statistics.median(seconds)


def share(seconds: float) -> str:
    return f"{seconds / PREDICTED_STEP_S:.2%} of a step of {PREDICTED_STEP_S} s"


def heal(folder: Path, options: argparse.Namespace) -> str:
    """Kills the last rank in the middle of a job and runs the next one."""
    with make_group(folder, LAYOUTS[options.ranks][0], 1) as group:
        run = group.run(*make_job(options.steps + 2))
        next(run)
        os.kill(group.pids[-1], signal.SIGKILL)
        killed_s = time.perf_counter()
        try:
            for _ in run:
                continue
            raise RuntimeError("the run outlived its rank")
        except Exception as error:
            noticed_s = time.perf_counter()
            reason = str(error)
        events = iter(group.run(*make_job(1)))
        next(events)
        served_s = time.perf_counter()
        assert any(isinstance(event, ResultEvent) for event in events)
    return f"noticed after {noticed_s - killed_s:.2f} s, serving again after {served_s - killed_s:.2f} s\n  ({reason})"


if __name__ == "__main__":
    sys.exit(main())
