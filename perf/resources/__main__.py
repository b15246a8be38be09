"""The resource ledger of a request: what it takes and what bounds that, as the tables of docs/load.md.

    python -m perf.resources [--config serve.toml] [--part request|server] [--out build/resources.json]

First a request alone, phase by phase and size by size, each in a process of its own (request.py). Then the processes of
a real server: idle, with one request under way and as many waiting as may, and afterwards.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from tritonclient.grpc import service_pb2_grpc

from perf.resources.request import PARTS, SIZES
from perf.soak.__main__ import metric
from perf.soak.plan import good_requests
from perf.soak.wire import OWN_CONNECTION, message, outcome_of
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import SetupError, StepVideoError
from stepvideo_serve.launch.leftovers import SHARED_MEMORY
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer

ROOT = Path(__file__).absolute().parents[2]
MODELS = ("ti2v", "ti2v_unary", "ti2v_quote", "text_encoder", "vae_encoder", "dit_denoiser", "vae_decoder")
RANK = "rank_process"
SETTLE_S = 3.0
PATIENCE_S = 120.0
LONG = {"NUM_FRAMES": 34, "HEIGHT": 320, "WIDTH": 320}  # pixels: some seconds of steps on a CPU
MIB = 2**20
COLUMNS = ("part", "size", "phase", "peak MiB", "held MiB", "seconds", "CPU s", "threads", "files")

Counts = dict[str, float]


def requests_alone() -> Iterable[list[Any]]:
    """A row of COLUMNS for each part, size and phase."""
    for part in PARTS:
        for size in SIZES:
            print(f"{part}, {size} ...", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "perf.resources.request", part, size]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SetupError(f"{part} of {size} must be measured, but failed: {done.stderr[-500:]}")
            for phase, taken in json.loads(done.stdout).items():
                yield [part, size, phase, *taken.values()]


def processes(server: TritonServer) -> dict[str, Counts]:
    """Threads, open files and resident MiB of each process, and MiB in /dev/shm under the name "shared memory"."""
    found: dict[str, Counts] = {}
    tritonserver = psutil.Process(server.pid)
    for process in (tritonserver, *tritonserver.children(recursive=True)):
        try:
            command = " ".join(process.cmdline())
            counts = {
                "threads": process.num_threads(),
                "files": process.num_fds(),
                "MiB": round(process.memory_info().rss / MIB, 1),
            }
        except psutil.Error:
            continue  # it has just ended
        names = (RANK, *(f"/{model}/" for model in MODELS))
        name = next((name.strip("/") for name in names if name in command), process.name())
        found[name] = counts
    regions = SHARED_MEMORY.glob(f"{server.shm_prefix}*")
    found["shared memory"] = {"MiB": round(sum(path.stat().st_blocks * 512 for path in regions) / MIB, 1)}
    return found


def on_a_server(server: TritonServer, config: ServeConfig) -> dict[str, dict[str, Counts]]:
    """The processes' counts: "idle", "full" (one request under way, `max_queued` wait, half of them at each public
    model), and "after"."""
    steps = np.array([config.limits.max_steps], np.int32)
    size = {name: np.array([value], np.int32) for name, value in LONG.items()}
    long = {**good_requests()[0], **size, "STEPS": steps}
    short = {**good_requests()[0], "STEPS": np.array([1], np.int32)}
    seen: dict[str, dict[str, Counts]] = {}
    with grpc.insecure_channel(server.grpc_url, options=OWN_CONNECTION) as channel:
        outcome_of(channel, message("ti2v_unary", short), PATIENCE_S)
        time.sleep(SETTLE_S)
        seen["idle"] = processes(server)
        with ExitStack() as stack:
            for number in range(1 + config.denoiser.max_queued):
                stack.callback(_in_flight(server.grpc_url, long, number % 2 == 1))
            _until_full(server, config.denoiser.max_queued)
            seen["full"] = processes(server)
        time.sleep(SETTLE_S)
        outcome_of(channel, message("ti2v_unary", short), PATIENCE_S)
        time.sleep(SETTLE_S)
        seen["after"] = processes(server)
    return seen


def _in_flight(url: str, values: Mapping[str, Any], streamed: bool) -> Callable[[], None]:
    """Sends a request; what ends it."""
    channel = grpc.insecure_channel(url, options=OWN_CONNECTION)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    over = threading.Event()

    def outgoing() -> Iterable[Any]:
        yield message("ti2v", values)
        over.wait()

    call = stub.ModelStreamInfer(outgoing()) if streamed else stub.ModelInfer.future(message("ti2v_unary", values))

    def end() -> None:
        call.cancel()
        over.set()
        channel.close()

    return end


def _until_full(server: TritonServer, waiting: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while metric(server.metrics_url, "stepvideo_queue_length") < waiting:
        if time.monotonic() > deadline_s:
            raise SetupError(f"{waiting} requests must wait, fewer do after {PATIENCE_S:g} s: see the server's log.")
        time.sleep(0.05)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """As Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def server_table(seen: Mapping[str, Mapping[str, Counts]]) -> str:
    """A row for each process: what it is idle, when the server is full, and afterwards."""
    rows = []
    for name, idle in seen["idle"].items():
        row = [name]
        for count in ("threads", "files", "MiB"):
            counts = [seen[when].get(name, {}).get(count) for when in ("idle", "full", "after")]
            row.append(" / ".join("" if value is None else f"{value:g}" for value in counts) if count in idle else "")
        rows.append(row)
    return table(("process", "threads", "files", "MiB"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.resources", description="What a request takes.")
    parser.add_argument("--config", type=Path, default=Path("serve.toml"))
    parser.add_argument("--part", choices=("request", "server"), help="default: both")
    parser.add_argument("--out", type=Path, default=Path("build/resources.json"), help="default: %(default)s")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    try:
        if options.part != "server":
            figures["request"] = list(requests_alone())
            print(table(COLUMNS, figures["request"]), flush=True)
        if options.part != "request":
            log = options.out.with_name("resources-server.log")
            with TritonServer(ServerOptions(ROOT / "model_repository", options.config, log=log)) as server:
                server.wait_ready(300.0)
                figures["server"] = on_a_server(server, ServeConfig.load(options.config))
            print(server_table(figures["server"]), flush=True)
    except StepVideoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
