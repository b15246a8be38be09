"""Builds one engine by Polygraphy's loaders, in a process of its own: the builder can crash, its loggers are per
process, and Polygraphy chooses between the two TensorRTs when it is imported (toolkit.child_environment).

    python -m export.engines.child JOB.json

Reads a Job; writes the engine, the log and, last of all, the result. On standard output: a line of JSON per step of
the builder. Ends by itself when its parent is gone (standard input closes).
"""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from export.engines.inspection import describe
from export.engines.messages import Messages, listen

Shape = tuple[int, ...]
KIB = 1024


@dataclass(frozen=True)
class Job:
    """One build.

    profile       input -> smallest, optimal and largest shape, for inputs whose size the graph leaves open
    plugins       the graph has operators of our own
    timing_cache  file of tactics that have been timed, read before and added to after; "" for none
    inspection    file for what the engine says of itself once it is loaded on the GPU; "" where it is not loaded
    """

    backend: str
    sm: int
    onnx: str
    engine: str
    log: str
    result: str
    profile: dict[str, tuple[Shape, Shape, Shape]]
    plugins: bool = False
    timing_cache: str = ""
    inspection: str = ""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Job":
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def main() -> int:
    """0: the engine is there. 1: it cannot be built, and the result says why."""
    job = Job.load(Path(sys.argv[1]))
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    began_s = time.monotonic()
    error, kernels = None, list[Any]()
    try:
        engine, kernels = _build(job)
        _write(Path(job.engine), engine)
    except (RuntimeError, OSError, ValueError, ImportError) as caught:
        error = str(caught)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    result = {"error": error, "seconds": round(time.monotonic() - began_s, 2), "peak_bytes": peak, "kernels": kernels}
    Path(job.result).write_text(json.dumps(result), encoding="utf-8")
    return 0 if error is None else 1


def _leave_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a daemon thread would hold when the process ends
        pass
    os._exit(1)


def _build(job: Job) -> tuple[Any, list[Any]]:
    """The engine's bytes, and the kernels that its plugins look up when they run. Raises RuntimeError with what the
    parser or the builder found."""
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath

    messages = listen(Path(job.log))
    refusals, kernels = _register_plugins(import_module(job.backend), job.sm) if job.plugins else ([], [])
    reading = "the ONNX graph must be one that TensorRT reads, it found"
    network = _reasoned(NetworkFromOnnxPath(job.onnx), reading, refusals, messages)
    building = "TensorRT must build the graph, it refused"
    loader = EngineBytesFromNetwork(network, _config(job), save_timing_cache=job.timing_cache or None)
    engine = _reasoned(loader, building, refusals, messages)
    if job.inspection:
        loading = "TensorRT must load the engine that it built, it refused"
        described = partial(describe, import_module(job.backend), engine)
        found = _reasoned(described, loading, refusals, messages)
        Path(job.inspection).write_text(json.dumps(found), encoding="utf-8")
    return engine, kernels


def _reasoned(loader: Callable[[], Any], sentence: str, refusals: list[str], messages: Messages) -> Any:
    """What the loader gives. Raises RuntimeError with the sentence and the reason: that of a plugin, or TensorRT's."""
    from polygraphy.exception import PolygraphyException

    try:
        return loader()
    except PolygraphyException as error:
        reason = "; ".join(refusals or messages.reasons[-1:] or [str(error)])
        raise RuntimeError(f"{sentence}: {reason}") from None


def _config(job: Job) -> Any:
    """The loader of the builder's configuration: target, profile, and a plan that is printed in detail."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, Profile

    profile = Profile()
    for name, shapes in job.profile.items():
        profile.add(name, *shapes)
    common = {
        "profiles": [profile] if job.profile else [],
        "load_timing_cache": job.timing_cache or None,
        "progress_monitor": _monitor(import_module(job.backend)),
    }
    if job.backend == "tensorrt_rtx":
        return CreateConfigRTX(compute_capabilities=[divmod(job.sm, 10)], **common)
    return CreateConfig(tf32=True, **common)  # as TensorRT's own default; Polygraphy's is off


def _register_plugins(trt: Any, sm: int) -> tuple[list[str], list[Any]]:
    """The sentences with which plugins refuse, and the kernels that they need; both filled during the build."""
    from stepvideo_kernels.plugins.registration import register

    registration = register(trt, sm=sm)
    return registration.refusals, registration.kernels


def _write(path: Path, engine: Any) -> None:
    with path.open("wb") as file:
        file.write(memoryview(engine))
        file.flush()
        os.fsync(file.fileno())


def _monitor(trt: Any) -> Any:
    class PrintedProgress(trt.IProgressMonitor):  # type: ignore[misc]
        """A line for every step of every phase."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            del parent
            self._steps[name] = steps
            self._say(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self._say(name, step + 1)
            return True

        def phase_finish(self, name: str) -> None:
            self._say(name, self._steps.pop(name, 0))

        def _say(self, phase: str, step: int) -> None:
            print(json.dumps({"phase": phase, "step": step, "steps": self._steps.get(phase, step)}), flush=True)

    return PrintedProgress()


if __name__ == "__main__":
    sys.exit(main())
