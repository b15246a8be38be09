"""Builds one engine, in a process of its own, because the builder can crash and its loggers are per process.

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
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from export.engines.toolkit import set_target

Shape = tuple[int, ...]
KIB = 1024


@dataclass(frozen=True)
class Job:
    """One build.

    profile  input -> smallest, optimal and largest shape, for inputs whose size the graph leaves open
    plugins  the graph has operators of our own
    """

    backend: str
    sm: int
    onnx: str
    engine: str
    log: str
    result: str
    profile: dict[str, tuple[Shape, Shape, Shape]]
    plugins: bool = False

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
    trt = import_module(job.backend)
    with open(job.log, "a", encoding="utf-8", buffering=1) as log:
        logger = _logger(trt, log)
        refusals, kernels = _register_plugins(trt, job.sm) if job.plugins else ([], [])
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(job.onnx):
            found = "; ".join([*refusals, *(parser.get_error(i).desc() for i in range(parser.num_errors))])
            raise RuntimeError(f"the ONNX graph must be one that TensorRT reads, it found: {found}")
        config = builder.create_builder_config()
        set_target(trt, config, job.backend, job.sm)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = _monitor(trt)
        if job.profile:
            profile = builder.create_optimization_profile()
            for name, shapes in job.profile.items():
                profile.set_shape(name, *shapes)
            config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            reason = "; ".join(refusals) or logger.last_error or "it gave no reason"
            raise RuntimeError(f"TensorRT must build the graph, it refused: {reason}")
        return engine, kernels


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


def _logger(trt: Any, log: Any) -> Any:
    class FileLogger(trt.ILogger):  # type: ignore[misc]
        """Every message to a file that is flushed line by line, so that a crash keeps it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last_error = message
            log.write(f"[{str(severity).rpartition('.')[2]}] {message}\n")

    return FileLogger()


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
