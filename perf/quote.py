"""How true the server's quotes are: after a few requests, predicted seconds against those that requests then take.

    python -m perf.quote [--config serve.toml] [--repeats 3]

The shapes that are quoted are partly those of the warm-up, partly others, each of them `repeats` times, in turn. Judged
is each shape's median error, since a shared machine takes up to a third longer from one minute to the next; the goal is
at most 10 %.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stepvideo_client import Client, Result
from stepvideo_serve.server_options import ServerOptions
from stepvideo_serve.tritonserver import TritonServer

PROMPT = "一艘小船在平静的湖面上缓缓驶过，镜头慢慢推近。"
IMAGE = Path("client/examples/first_frame.png")
GOAL = 0.10


class Shape(NamedTuple):
    frames: int
    height: int
    width: int
    steps: int

    def __str__(self) -> str:
        return f"{self.frames} x {self.height}x{self.width}, {self.steps} steps"


WARM_UP = (Shape(17, 96, 160, 6), Shape(34, 128, 192, 6), Shape(51, 192, 256, 6))
QUOTED = (*WARM_UP[1:], Shape(34, 128, 192, 24), Shape(34, 160, 224, 8), Shape(51, 128, 192, 8), Shape(68, 192, 256, 4))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.quote", description="Quotes against the truth.")
    parser.add_argument("--config", type=Path, default=Path("serve.toml"))
    parser.add_argument("--repeats", type=int, default=3, help="of the table; default: %(default)s")
    parser.add_argument("--ready-timeout", type=float, default=300.0, metavar="S", help="default: %(default)g s")
    options = parser.parse_args(argv)
    server = TritonServer(ServerOptions(Path("model_repository"), options.config, log=Path("build/bench-quote.log")))
    with server:
        print("starting the server ...", file=sys.stderr)
        server.wait_ready(options.ready_timeout)
        with Client(server.grpc_url, idle_timeout_s=300.0) as client:
            for number, shape in enumerate((*WARM_UP, *WARM_UP), start=1):  # what is cold is forgotten the second time
                print(f"warm-up {number} of {2 * len(WARM_UP)}: {shape}", file=sys.stderr)
                _take(client, shape, seed=number)
            rounds = [[_row(client, shape, seed) for shape in QUOTED] for seed in range(options.repeats)]
    medians = [statistics.median(errors) for errors in zip(*rounds, strict=True)]
    for shape, median in zip(QUOTED, medians, strict=True):
        print(f"{shape!s:>32}  median error {median:+6.1%}")
    worst = max(map(abs, medians))
    print(f"largest median {worst:.1%} (goal: at most {GOAL:.0%}: {'met' if worst <= GOAL else 'missed'})")
    print(f"largest single error {max(abs(error) for errors in rounds for error in errors):.1%}")
    return 0


def _row(client: Client, shape: Shape, seed: int) -> float:
    """Prints and returns the relative error for one shape."""
    # The prompt of every request is new, as the quote assumes: two tokens more or less do not matter.
    quote = client.quote(
        num_frames=shape.frames, height=shape.height, width=shape.width, steps=shape.steps, prompt_tokens=140
    )
    report, wall_s = _take(client, shape, seed)
    error = quote.seconds / report["seconds"]["total"] - 1.0
    print(f"{shape!s:>32}  predicted {quote.seconds:7.2f} s  true {report['seconds']['total']:7.2f} s  {error:+6.1%}"
          f"  (seen by the client {wall_s:7.2f} s)", flush=True)  # fmt: skip
    return float(error)


def _take(client: Client, shape: Shape, seed: int) -> tuple[dict[str, dict[str, float]], float]:
    """The report of a request that nobody has asked before, and how long it took from here."""
    began_s = time.perf_counter()
    prompt = f"{PROMPT}{time.time_ns()}"
    events = client.generate(
        IMAGE,
        prompt,
        seed=seed,
        num_frames=shape.frames,
        height=shape.height,
        width=shape.width,
        steps=shape.steps,
    )
    for event in events:
        if isinstance(event, Result):
            return event.report, time.perf_counter() - began_s
    raise RuntimeError("the server ended without a result")


if __name__ == "__main__":
    sys.exit(main())
