"""Load on the real server by NVIDIA's perf_analyzer: gRPC streams (ti2v) and unary calls (ti2v_unary).

    python -m perf.analyzer [--config serve.toml | --url HOST:PORT] [--inputs perf/inputs/small.json]
        [--models ti2v,ti2v_unary] [--concurrency 1,2] [--rates 0.5] [--requests 6] [--out build/perf]

Every load is one run of perf_analyzer with a CSV, an export (JSON) and a log of its own in --out; then
perf.analyzer.report makes report.md, report.json and report.png of all exports there. A load whose run fails is
reported and leaves no export; the exit code is then 1. A load that perf_analyzer has lost (its export breaks off, or it
stalls) is measured again, which is said.
The program comes out of a pinned wheel, into build/perf_analyzer.
"""

import argparse
import base64
import contextlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.analyzer.idle import IdleClock
from perf.analyzer.report import read_export, write_report
from perf.analyzer.wheel import Wheel
from stepvideo_serve.errors import SetupError
from stepvideo_serve.launch.address import host_port
from stepvideo_serve.launch.options import ServerOptions
from stepvideo_serve.launch.server import TritonServer

ROOT = Path(__file__).absolute().parents[2]
# Later ones need a newer C library than this project asks for.
WHEEL = Wheel("tritonclient", "2.51.0", "c485bb0123bdf310f90bc8b03d3489b28df2ffed55b30c7eee0b795b48113d52")
LIBRARIES = {
    "libb64.so.0d": "libb64-*.so.0d",
    "libcudart.so.12": "libcudart-*.so.12*",
}  # as it asks: as they are called
# perf_analyzer reads a number of every output that a response lacks (a progress response has no LATENTS) from memory
# that was allocated for nothing. Where that memory held the C library's pointer to the next free piece, shifted as its
# caches of free pieces shift pointers, some addresses were a NaN as FP32; the program's JSON writer stops at a NaN, and
# the export breaks off. Without those caches the number is part of an arena's address, or freed memory: finite.
TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.perturb=1"
ATTEMPTS = 3
STREAMED = "ti2v"
ANALYZER_S = 6 * 3600.0
# perf_analyzer can wait for ever before its first request: a thread of it announces that it is paused, and is woken
# before it has begun to wait (RequestRateWorker::HandleExecuteOff, seen on a machine with other work to do). So long a
# server then has nothing to do: longer than any part of a request in which nothing is queued, and than any pause
# between two requests at random.
STALLED_S = 300.0
PAUSES = 30.0
LOOK_S = 5.0


@dataclass(frozen=True)
class Load:
    """One run: `kind` is "concurrency" (value: requests in flight) or "rate" (value: requests a second, at random)."""

    model: str
    kind: str
    value: float

    @property
    def name(self) -> str:
        """Of its files; perf_report.NAME reads it."""
        return f"{self.model}.{self.kind}.{self.value:g}"

    def arguments(self) -> list[str]:
        arguments = ["-m", self.model, *(["--streaming"] if self.model == STREAMED else [])]
        only = f"{self.value:g}:{self.value:g}"  # the end is not the start by default
        if self.kind == "concurrency":
            return [*arguments, f"--concurrency-range={only}"]
        return [*arguments, f"--request-rate-range={only}", "--request-distribution=poisson"]

    @property
    def stalled_s(self) -> float:
        """How long a server may have nothing to do."""
        return STALLED_S + (PAUSES / self.value if self.kind == "rate" else 0.0)


class LostLoad(SetupError):
    """perf_analyzer has failed, in a way that says nothing about the server: an export that breaks off, or a stall."""


@dataclass(frozen=True)
class Analyzer:
    """The program, and the folder that the dynamic loader must search for it."""

    program: Path
    libraries: Path

    @classmethod
    def install(cls, folder: Path) -> "Analyzer":
        """Takes it out of its wheel into `folder`, if it is not there. Raises SetupError when that fails."""
        program, libraries = folder / "perf_analyzer", folder / "lib"
        WHEEL.extract("/bin/perf_analyzer", program)
        wheel = importlib.util.find_spec("pytriton")
        if wheel is None or wheel.origin is None:
            raise SetupError("perf_analyzer needs libraries of nvidia-pytriton: pip install stepvideo-serve[cpu].")
        bundled = Path(wheel.origin).parents[1] / "nvidia_pytriton.libs"
        libraries.mkdir(exist_ok=True)
        for asked, called in LIBRARIES.items():
            found = sorted(bundled.glob(called))
            if not found:
                raise SetupError(f"{bundled} must have {called}, but has not: install nvidia-pytriton again.")
            (libraries / asked).unlink(missing_ok=True)
            (libraries / asked).symlink_to(found[0])
        return cls(program, libraries)

    def run(self, load: Load, url: str, data: Path, requests: int, out: Path, extra: Sequence[str]) -> str | None:
        """Measures one load into `out`; None, or a sentence that says why there is no result.

        perf_analyzer gives up when a single request fails, so that no row mixes successes with refusals. A load that
        perf_analyzer itself has lost is measured again, up to ATTEMPTS times in all.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._run_once(load, url, data, requests, out, extra)
            except LostLoad as error:
                reason = str(error)
                print(f"  attempt {attempt} of {ATTEMPTS}: {reason}", file=sys.stderr)
        return reason

    def _run_once(self, load: Load, url: str, data: Path, requests: int, out: Path, extra: Sequence[str]) -> str | None:
        """As run. Raises LostLoad."""
        export, log = out / f"{load.name}.export.json", out / f"{load.name}.log"
        partial = export.with_suffix(".partial")
        for path in (export, partial):  # it does not write over a file
            path.unlink(missing_ok=True)
        command = [
            *(str(self.program), "-i", "grpc", "-u", url, *load.arguments()),
            *(f"--input-data={data}", f"--request-count={requests}"),
            *("-f", str(out / f"{load.name}.csv"), f"--profile-export-file={partial}", *extra),
        ]
        searched = os.environ.get("LD_LIBRARY_PATH")
        given = os.environ.get("GLIBC_TUNABLES")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": f"{self.libraries}{os.pathsep}{searched or ''}".rstrip(":"),
            "GLIBC_TUNABLES": f"{given}:{TUNABLES}" if given else TUNABLES,
            "no_proxy": ",".join(filter(None, (os.environ.get("no_proxy"), host_port(url, 8001)[0]))),
        }
        with (
            log.open("wb") as output,
            subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process,
        ):
            try:
                code = _ended(process, load, url)
            finally:
                process.kill()
        if code is None:
            return f"it did not end in {ANALYZER_S / 3600:g} hours"
        if code == 0 and partial.is_file():
            try:
                read_export(partial)
            except SetupError as error:
                partial.unlink()
                raise LostLoad(f"{error} (exit code 0, log {log})") from None
            partial.replace(export)
            return None
        partial.unlink(missing_ok=True)
        told = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        causes = [line for line in told if "error: " in line.lower()] or told[-1:] or ["nothing was said"]
        return f"{causes[0]} (exit code {code}, log {log})"


def _ended(process: "subprocess.Popen[bytes]", load: Load, url: str) -> int | None:
    """The exit code; None after ANALYZER_S. Raises LostLoad for a stall."""
    clock, until_s = IdleClock(url), time.monotonic() + ANALYZER_S
    while time.monotonic() < until_s:
        try:
            return process.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            if (idle_s := clock.idle_s()) > load.stalled_s:
                raise LostLoad(f"perf_analyzer has sent nothing for {idle_s:.0f} s") from None
    return None


def expand(path: Path) -> dict[str, Any]:
    """The input data of perf_analyzer for a file {"image": PATH beside it, "requests": [{INPUT: value}]}.

    Every value is a tensor of shape [1]. A BYTES tensor in base 64 is taken as it goes on the wire, so the picture
    has its length in front. Raises SetupError for a file that is not like this.
    """
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        picture = (path.parent / described["image"]).read_bytes()
        image = {"b64": base64.b64encode(struct.pack("<I", len(picture)) + picture).decode()}
        requests = [
            {name: {"content": [value], "shape": [1]} for name, value in request.items()}
            for request in described["requests"]
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SetupError(
            f'{path} must be JSON as {{"image": PATH, "requests": [{{INPUT: value}}]}}, found {error}: correct it.'
        ) from None
    if not requests:
        raise SetupError(f"{path} must describe at least one request, it has none: add one.")
    return {"data": [{**request, "IMAGE": {"content": image, "shape": [1]}} for request in requests]}


def loads(models: Sequence[str], concurrency: Sequence[float], rates: Sequence[float]) -> list[Load]:
    """Every model under every load, the lightest first."""
    return [
        Load(model, kind, value)
        for model in models
        for kind, values in (("concurrency", concurrency), ("rate", rates))
        for value in sorted(values)
    ]


@contextlib.contextmanager
def _server_url(options: argparse.Namespace) -> Iterator[str]:
    """The address given, or that of a server which runs as long as the measurement."""
    if options.url is not None:
        yield options.url
        return
    log = options.out / "server.log"
    print(f"starting the server with {options.config} (log: {log})", file=sys.stderr)
    with TritonServer(ServerOptions(ROOT / "model_repository", options.config, log=log)) as server:
        server.wait_ready()
        yield server.grpc_url


def measure(options: argparse.Namespace) -> int:
    """All loads, then the report; how many failed."""
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.out / "input.json"
    data.write_text(json.dumps(expand(options.inputs)), encoding="utf-8")
    analyzer = Analyzer.install(ROOT / "build/perf_analyzer")
    planned = loads(options.models, options.concurrency, options.rates)
    failed = 0
    with _server_url(options) as url:
        for number, load in enumerate([Load(STREAMED, "concurrency", 1.0), *planned]):
            what = f"load {number} of {len(planned)}" if number else "warm-up"
            print(f"{what}: {load.model}, {load.kind} {load.value:g}, {options.requests} requests", file=sys.stderr)
            reason = analyzer.run(load, url, data, options.requests, options.out, options.analyzer_argument)
            if reason is not None:
                failed += 1
                print(f"  no result: {reason}", file=sys.stderr)
            if number == 0:  # the first requests load, compile and fill caches: not a row
                (options.out / f"{load.name}.export.json").unlink(missing_ok=True)
    print(write_report(options.out), end="")
    print(f"wrote {options.out}/report.md, report.json, report.png and the exports", file=sys.stderr)
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.analyzer", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", type=Path, default=Path("serve.toml"), help="a server is started with it; default: %(default)s")
    add("--url", help="HOST:PORT of a running server's gRPC, instead")
    add("--inputs", type=Path, default=ROOT / "perf/inputs/small.json", help="the requests; default: %(default)s")
    add("--models", type=_names, default=["ti2v", "ti2v_unary"], help="default: ti2v,ti2v_unary")
    add("--concurrency", type=_numbers, default=[1.0, 2.0], metavar="N,N", help="in flight; default: 1,2")
    add("--rates", type=_numbers, default=[0.5], metavar="X,X", help="requests a second, Poisson; default: 0.5")
    add("--requests", type=int, default=6, metavar="N", help="per load; default: %(default)s")
    add("--out", type=Path, default=Path("build/perf"), help="default: %(default)s")
    add("--analyzer-argument", action="append", default=[], metavar="--NAME=VALUE", help="passed on; may be repeated")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[float]:
    values = [float(value) for value in _names(text)]
    if not all(value > 0 for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers above 0, got {text}")
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every load has a row; 1 otherwise, also when nothing could be measured."""
    try:
        return 1 if measure(_parser().parse_args(argv)) else 0
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
