"""How little is lost around the steps: starting, a full queue, going first, leaving. On the real server.

    python -m perf.scheduling [--model-dir DIR] [--engines-dir DIR] [--requests 4] [--steps 50] [--repeats 3]

The ranks get one processor and the other stages another, as on machines where the ranks have GPUs of their own.

cold start   from starting the server until every model is ready
saturation   bare steps of all requests (the step of a request alone, just before and after) over the time from the
             first step to the last while the queue is never empty
preemption   how much longer the ranks were away from a parked request than the steps of the one that went first took
cancelling   from leaving until the next request's first step begins, which includes the end of the step under way
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from stepvideo_client import Client, Result, StepEvent
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer

PROMPT = "红色圆形向右移动。"
IMAGE = Path("client/examples/first_frame.png")
HIGH, LOW = 1, 3
PREEMPT_AT_STEP = 3
SATURATION_GOAL = 0.95
CANCEL_MARGIN_S = 0.1


@dataclass
class Taken:
    """When each step of a request was heard of, and what the ranks needed for it (after its end)."""

    heard_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)

    @property
    def typical_s(self) -> float:
        return statistics.median(self.step_s)


class Bench:
    """Requests to one server; every one differs from all others."""

    def __init__(self, client: Client, steps: int) -> None:
        self._client, self._steps = client, steps

    def take(self, on_step: Callable[[int], None] = lambda _: None, priority: int = 2) -> Taken:
        """A request until its end; `on_step` is called with each step that is done."""
        taken = Taken()
        for event in self._events(priority):
            if isinstance(event, Result):
                taken.step_s = event.report["step_seconds"]
            elif event.step > len(taken.heard_s):
                taken.heard_s.append(time.perf_counter())
                on_step(event.step)
        return taken

    def leave_at(self, step: int) -> float:
        """Begins a request and leaves it after a step; returns when."""
        events = self._events(priority=2)
        for event in events:
            if isinstance(event, StepEvent) and event.step == step:
                break
        left_s = time.perf_counter()
        events.close()
        return left_s

    def _events(self, priority: int) -> Generator[StepEvent | Result, None, None]:
        seed = time.time_ns() % 2**32
        prompt = f"{PROMPT}{seed}"
        return self._client.generate(
            IMAGE,
            prompt,
            num_frames=34,
            height=128,
            width=192,
            steps=self._steps,
            seed=seed,
            priority=priority,
            output="latents",
        )


def saturation(bench: Bench, requests: int) -> tuple[float, float, float]:
    """Seconds of a bare step, and shares of the time from the first step's beginning to the last one's end: bare steps,
    and steps as they were. A request runs alone before and after, since machines do not keep their pace."""
    before_s = bench.take().typical_s
    with ThreadPoolExecutor(requests) as pool:
        all_taken = list(pool.map(lambda _: bench.take(), range(requests)))
    first = min(all_taken, key=lambda taken: taken.heard_s[0])
    wall_s = max(taken.heard_s[-1] for taken in all_taken) - (first.heard_s[0] - first.step_s[0])
    steps_s = [seconds for taken in all_taken for seconds in taken.step_s]
    bare_s = (before_s + bench.take().typical_s) / 2
    return bare_s, len(steps_s) * bare_s / wall_s, sum(steps_s) / wall_s


def preemption(bench: Bench) -> tuple[float, float]:
    """Seconds lost to going there and back, and from sending the urgent request to the end of its first step."""
    due = threading.Event()
    urgent: list[tuple[float, Taken]] = []

    def interrupt() -> None:
        due.wait()
        urgent.append((time.perf_counter(), bench.take(priority=HIGH)))

    thread = threading.Thread(target=interrupt)
    thread.start()
    parked = bench.take(lambda step: due.set() if step == PREEMPT_AT_STEP else None, priority=LOW)
    thread.join()
    sent_s, first = urgent[0]
    gaps = [later - sooner for sooner, later in pairwise(parked.heard_s)]
    return max(gaps) - parked.typical_s - sum(first.step_s), first.heard_s[0] - sent_s


def cancelling(bench: Bench) -> tuple[float, float]:
    """Seconds from leaving until the next request's first step began, and that step's own."""
    with ThreadPoolExecutor(2) as pool:
        leaving = pool.submit(bench.leave_at, PREEMPT_AT_STEP)
        time.sleep(0.2)
        waiting = pool.submit(bench.take)
        left_s, taken = leaving.result(), waiting.result()
    return taken.heard_s[0] - taken.step_s[0] - left_s, taken.typical_s


def main() -> int:
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "serve.toml")
        model = f'[model]\ndir = "{options.model_dir.absolute()}"\nengines_dir = "{options.engines_dir.absolute()}"\n'
        config.write_text(f"{model}[denoiser]\nthreads = 1\n[decoder]\nthreads = 1\n", encoding="utf-8")
        server = TritonServer(ServerOptions(Path("model_repository"), config, log=Path("build/bench-scheduling.log")))
        began_s = time.perf_counter()
        with server:
            server.wait_ready(options.ready_timeout)
            print(f"cold start to ready: {time.perf_counter() - began_s:.1f} s", flush=True)
            with Client(server.grpc_url, idle_timeout_s=300.0) as client:
                _measure(Bench(client, options.steps), options)
    return 0


def _measure(bench: Bench, options: argparse.Namespace) -> None:
    bench.take()
    rounds = [saturation(bench, options.requests) for _ in range(options.repeats)]
    bare_s, bare, busy = (statistics.median(column) for column in zip(*rounds, strict=True))
    least, most = min(row[1] for row in rounds), max(row[1] for row in rounds)
    print(
        f"saturation, {options.requests} requests of {options.steps} steps: bare steps ({bare_s:.3f} s) {bare:.1%} of "
        f"the time, {_verdict(bare >= SATURATION_GOAL)} (goal: {SATURATION_GOAL:.0%}; from {least:.1%} to {most:.1%}); "
        f"the ranks were in steps {busy:.1%}",
        flush=True,
    )
    rows = [preemption(bench) for _ in range(options.repeats)]
    lost_s, first_s = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"preemption: {lost_s:.3f} s lost there and back; the urgent one's first step is done after {first_s:.2f} s")
    left = [cancelling(bench) for _ in range(options.repeats)]
    freed_s = max(seconds for seconds, _ in left)
    allowed_s = max(step_s for _, step_s in left) + CANCEL_MARGIN_S
    print(
        f"cancelling: the next first step begins after {freed_s:.3f} s at most, {_verdict(freed_s <= allowed_s)} "
        f"(goal: one step and {CANCEL_MARGIN_S:g} s, {allowed_s:.3f} s)"
    )


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.scheduling", description="What is lost around the steps.")
    parser.add_argument("--model-dir", type=Path, default=Path("toyworld/checkpoint"))
    parser.add_argument("--engines-dir", type=Path, default=Path("build/toyworld"))
    parser.add_argument("--requests", type=int, default=4, help="at once, for saturation; default: %(default)s")
    parser.add_argument("--steps", type=int, default=50, help="of each request; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="of everything; default: %(default)s")
    parser.add_argument("--ready-timeout", type=float, default=300.0, metavar="S", help="default: %(default)g s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
