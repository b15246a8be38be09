"""How true the server's quotes are: after a few requests, predicted seconds against those that requests then take.

    python -m perf.quote [--config serve.toml] [--repeats 3]

The shapes and presets that are quoted are partly those of the warm-up, partly others, each of them `repeats` times, in
turn. A virtual machine whose processors are shared with others (steal in /proc/stat) takes up to half longer from one
minute to the next, which no server can know beforehand. So the quote is also compared as if that share had stayed what
it was while the request before was measured, which is what it was made from. Judged is each shape's median of that; the
goal is at most 10 %.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from stepvideo_client import Client, Result
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer

PROMPT = "一艘小船在平静的湖面上缓缓驶过，镜头慢慢推近。"
IMAGE = Path("client/examples/first_frame.png")
GOAL = 0.10


class Shape(NamedTuple):
    frames: int
    height: int
    width: int
    steps: int
    quality: str = "exact"

    def __str__(self) -> str:
        quality = "mask" if self.quality.startswith("mask:") else self.quality
        return f"{self.frames} x {self.height}x{self.width}, {self.steps} steps, {quality}"


MASK = "mask:111111000100010001000111"
WARM_UP = (
    *(Shape(17, 96, 160, 6), Shape(34, 128, 192, 6), Shape(51, 192, 256, 6)),
    *(Shape(34, 128, 192, 24, "balanced"), Shape(34, 128, 192, 24, "fast")),
)
QUOTED = (
    *(*WARM_UP[1:], Shape(34, 128, 192, 24), Shape(34, 160, 224, 8), Shape(51, 128, 192, 8), Shape(68, 192, 256, 4)),
    *(Shape(34, 128, 192, 24, MASK), Shape(51, 128, 192, 24, "fast")),
)


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
            rows = _rows(client, options.repeats)
    worst = 0.0
    for shape in QUOTED:
        seen = statistics.median(row.error for row in rows if row.shape == shape)
        net = statistics.median(row.net for row in rows if row.shape == shape)
        print(f"{shape!s:>42}  median error {seen:+6.1%}, at an unchanged share of the processors {net:+6.1%}")
        worst = max(worst, abs(net))
    print(f"largest median {worst:.1%} (goal: at most {GOAL:.0%}: {'met' if worst <= GOAL else 'missed'})")
    return 0


class Asked(TypedDict):
    """The options that a quote and a request share."""

    num_frames: int
    height: int
    width: int
    steps: int
    quality: str


class Row(NamedTuple):
    """Relative errors of one quote: as seen, and as if other machines had taken what they took just before."""

    shape: Shape
    error: float
    net: float


class Stolen:
    """The share of the processors' time that other machines on this host took, since the last question."""

    def __init__(self) -> None:
        self._last = self._read()

    def share(self) -> float:
        """0 to 1."""
        last, self._last = self._last, self._read()
        total, stolen = (now - then for now, then in zip(self._last, last, strict=True))
        return stolen / total if total else 0.0

    def _read(self) -> tuple[int, int]:
        """Busy and stolen time, and stolen time alone: proc(5), fields of "cpu" up to steal."""
        fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[1:9]]
        return sum(fields) - fields[3] - fields[4], fields[7]


def _rows(client: Client, repeats: int) -> list[Row]:
    """Quotes and requests in turn, printed; the request before the first one says what was taken before it."""
    stolen = Stolen()
    _take(client, WARM_UP[1], seed=0)
    before = stolen.share()
    rows = []
    for seed in range(repeats):
        for shape in QUOTED:
            quoted_s, true_s = _pair(client, shape, seed)
            during = stolen.share()
            error = quoted_s / true_s - 1.0
            net = quoted_s / true_s * (1.0 - before) / (1.0 - during) - 1.0
            print(f"{shape!s:>42}  predicted {quoted_s:7.2f} s  true {true_s:7.2f} s  {error:+6.1%}  "
                  f"taken by others {before:4.0%}, then {during:4.0%}: {net:+6.1%}", flush=True)  # fmt: skip
            rows.append(Row(shape, error, net))
            before = during
    return rows


def _pair(client: Client, shape: Shape, seed: int) -> tuple[float, float]:
    """Seconds of the quote for a shape, and of the request."""
    # The prompt of every request is new, as the quote assumes: two tokens more or less do not matter.
    quote = client.quote(**_options(shape), prompt_tokens=140)
    return quote.seconds, _take(client, shape, seed)["seconds"]["total"]


def _take(client: Client, shape: Shape, seed: int) -> dict[str, dict[str, float]]:
    """The report of a request that nobody has asked before."""
    prompt = f"{PROMPT}{time.time_ns()}"
    events = client.generate(IMAGE, prompt, seed=seed, **_options(shape))
    for event in events:
        if isinstance(event, Result):
            return event.report
    raise RuntimeError("the server ended without a result")


def _options(shape: Shape) -> Asked:
    """What a quote and a request have in common."""
    frames, height, width, steps, quality = shape
    return {"num_frames": frames, "height": height, "width": width, "steps": steps, "quality": quality}


if __name__ == "__main__":
    sys.exit(main())
