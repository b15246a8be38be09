"""What the gateway costs: the same jobs by the same callers through a gateway, and of the same servers directly.

    python -m perf.gateway [--jobs 200] [--callers 20] [--servers 2] [--step-s 0.2] [--steps 10]
                           [--model-dir DIR] [--engines-dir DIR] [--database URL] [--out build/bench-gateway.json]

With --step-s above 0 the ranks sleep for so long with each step (sleeping_rank.py), and the gates hold: throughput at
least 95 % of that of the servers alone, which are driven just before and just after; 95 % of the GETs of a video object
answered within 20 ms; the gateway's memory flat in the second half of its jobs. Exit code 1 if one is missed. With
--step-s 0 ranks compute, on processors that callers, gateway and servers share: the figures are printed without gates.
"""

import argparse
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from perf.gateway.callers import OverHttp, Taken, Work, directly
from perf.soak.growth import Sample, Sampler, slope
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer

MODEL = "from perf.gateway.sleeping_denoiser import SleepingDenoiser as TritonPythonModel\n"
STEP_VARIABLE = "STEPVIDEO_BENCH_STEP_S"
SHARE_GOAL, GET_GOAL_S = 0.95, 0.020
NO_SHARED_MEMORY = "stepvideo_gateway"  # no file of this name: a gateway has none
PICTURE_SIDE = 416  # half a megabyte of noise: a gateway that kept pictures would be noticed
ADDRESS = re.compile(r"gateway: http://(\S+)")
CONFIG = """
[listen]
port = 0
[servers]
urls = {urls}
[jobs]
database = "{database}"
folder = "videos"
"""


@contextmanager
def servers(count: int, step_s: float, options: argparse.Namespace, folder: Path) -> Iterator[list[str]]:
    """So many real servers, ready; their gRPC endpoints."""
    repository = Path("model_repository").absolute()
    if step_s:
        repository = shutil.copytree(repository, folder / "repository")
        (repository / "dit_denoiser" / "1" / "model.py").write_text(MODEL, encoding="utf-8")
    config = folder / "serve.toml"
    model = f'[model]\ndir = "{options.model_dir.absolute()}"\nengines_dir = "{options.engines_dir.absolute()}"\n'
    config.write_text(
        f"{model}[denoiser]\nthreads = 1\nmax_queued = {options.callers}\n[decoder]\nthreads = 1\n", encoding="utf-8"
    )
    os.environ[STEP_VARIABLE] = str(step_s)
    with ExitStack() as stack:
        started = [
            TritonServer(ServerOptions(repository, config, log=Path(f"build/bench-gateway-server{number}.log")))
            for number in range(count)
        ]
        for server in started:
            stack.enter_context(server)
            server.wait_ready(options.ready_timeout)
        yield [server.grpc_url for server in started]


def through_gateway(work: Work, urls: Sequence[str], database: str, folder: Path) -> tuple[Taken, list[Sample], float]:
    """All jobs through a gateway process of its own; what was taken, its memory, and the processor seconds it used."""
    config = folder / "gateway.toml"
    config.write_text(CONFIG.format(urls=json.dumps(list(urls)), database=database), encoding="utf-8")
    line = [sys.executable, "-m", "stepvideo_gateway", "--config", str(config)]
    with (
        Path("build/bench-gateway.log").open("w", encoding="utf-8") as log,
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            found = ADDRESS.match(process.stdout.readline())
            if found is None:
                raise RuntimeError("the gateway did not start: see build/bench-gateway.log")
            callers = OverHttp(work, found[1])
            with Sampler(process.pid, NO_SHARED_MEMORY, lambda: callers.taken.ended) as sampler:
                taken = callers.run()
            times = psutil.Process(process.pid).cpu_times()
            return taken, sampler.samples, times.user + times.system
        finally:
            process.terminate()
            process.wait(30)


def figures(
    work: Work, alone: Sequence[Taken], gateway: Taken, memory: Sequence[Sample], cpu_s: float
) -> dict[str, Any]:
    """What is printed."""
    alone_rate = statistics.mean(work.jobs / taken.wall_s for taken in alone)
    gateway_rate = work.jobs / gateway.wall_s
    return {
        "jobs": work.jobs,
        "callers": work.callers,
        "steps": work.steps,
        "jobs_per_s_alone": [round(work.jobs / taken.wall_s, 4) for taken in alone],
        "jobs_per_s_gateway": round(gateway_rate, 4),
        "share": round(gateway_rate / alone_rate, 4),
        "gets": len(gateway.get_s),
        "get_ms_p50": round(percentile(gateway.get_s, 0.50) * 1000, 2),
        "get_ms_p95": round(percentile(gateway.get_s, 0.95) * 1000, 2),
        "get_ms_max": round(max(gateway.get_s) * 1000, 2),
        "memory_mib": round(memory[-1].server / 2**20, 1),
        "mib_per_100_jobs": round(slope([one.requests for one in memory], [one.server for one in memory]), 3),
        "flat_below": round(len(work.image) / 10 * 100 / 2**20, 3),  # one picture in ten stays, and nothing else
        "gateway_cpu_s_per_job": round(cpu_s / work.jobs, 4),
        "machine_load": [round(load, 2) for load in os.getloadavg()],
    }


def noise() -> bytes:
    """A PNG that cannot be made smaller."""
    pixels = np.random.default_rng(0).integers(0, 256, (PICTURE_SIDE, PICTURE_SIDE, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(round(share * len(ordered), 6)) - 1)]


def missed(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each gate that is not met."""
    sentences = []
    if not found["share"] >= SHARE_GOAL:
        sentences.append(f"throughput must be {SHARE_GOAL:.0%} of the servers' alone, got {found['share']:.1%}")
    if not found["get_ms_p95"] < GET_GOAL_S * 1000:
        sentences.append(f"95 % of GETs must take less than {GET_GOAL_S * 1000:g} ms, got {found['get_ms_p95']} ms")
    if not found["mib_per_100_jobs"] < found["flat_below"]:
        grown, most = found["mib_per_100_jobs"], found["flat_below"]
        sentences.append(f"memory must grow by less than {most} MiB per 100 jobs, got {grown}")
    return sentences


def main() -> int:
    options = _parser().parse_args()
    size = {"num_frames": options.frames, "height": options.height, "width": options.width}
    work = Work(options.jobs, options.callers, noise(), options.steps, **size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"starting {options.servers} servers ...", file=sys.stderr)
        with servers(options.servers, options.step_s, options, folder) as urls:
            directly(replace(work, jobs=options.servers * 2, callers=options.servers), urls)  # warm
            print("the servers alone ...", file=sys.stderr)
            before = directly(work, urls)
            print("through the gateway ...", file=sys.stderr)
            gateway, memory, cpu_s = through_gateway(work, urls, options.database, folder)
            print("the servers alone, again ...", file=sys.stderr)
            after = directly(work, urls)
    found = figures(work, (before, after), gateway, memory, cpu_s)
    for key, value in found.items():
        print(f"{key:<22} {value}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if not options.step_s:
        print("no gates: callers, gateway and ranks share the processors")
        return 0
    wrong = missed(found)
    print("\n".join(f"MISSED: {sentence}" for sentence in wrong) or "all gates met")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.gateway", description="The gateway against servers alone.")
    add = parser.add_argument
    add("--jobs", type=int, default=200)
    add("--callers", type=int, default=20)
    add("--servers", type=int, default=2)
    add("--step-s", type=float, default=0.2, metavar="S", help="that ranks sleep with each step; 0: they compute")
    add("--steps", type=int, default=10, help="of each job; default: %(default)s")
    add("--frames", type=int, default=17)
    add("--height", type=int, default=32)
    add("--width", type=int, default=32)
    add("--model-dir", type=Path, default=Path("toyworld/checkpoint"))
    add("--engines-dir", type=Path, default=Path("build/toyworld"))
    add("--database", default="sqlite+aiosqlite:///jobs.sqlite", help="of the gateway; default: SQLite, a new file")
    add("--ready-timeout", type=float, default=300.0, metavar="S", help="default: %(default)g s")
    add("--out", type=Path, default=Path("build/bench-gateway.json"), help="the figures; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
