"""Runs one build in a child process and says how it ended."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.engines.child import Job
from stepvideo_serve.errors import ExportError

LOG_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True)
class Built:
    """Of a finished build: how long it took, the most memory that its process held, and the kernels of its plugins."""

    seconds: float
    peak_bytes: int
    kernels: Sequence[Mapping[str, Any]] = ()


class Children:
    """The processes that are at work, which another thread may end."""

    def __init__(self) -> None:
        self._lock, self._running, self._ended = threading.Lock(), set[subprocess.Popen[bytes]](), False

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Raises ExportError after `end`."""
        with self._lock:
            if self._ended:
                raise ExportError("the run was ended before this build")
            child = subprocess.Popen(command, **options)
            self._running.add(child)
            return child

    def forget(self, child: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._running.discard(child)

    def end(self) -> None:
        """Kills those at work, and lets no other begin."""
        with self._lock:
            self._ended = True
            for child in self._running:
                child.kill()


def run_child(
    job: Job,
    folder: Path,
    environment: Mapping[str, str],
    tell: Callable[[str], None],
    children: Children | None = None,
) -> Built:
    """Builds in a process that lives in `folder`, one of `children`; `tell` gets a line per step of the builder.

    Raises ExportError with the reason when the builder fails or crashes; what it printed is in the job's log.
    """
    request = folder / "job.json"
    job.save(request)
    log, children = Path(job.log), children or Children()
    with log.open("wb") as messages:
        child = children.start(
            [sys.executable, "-m", "export.engines.child", str(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the child below
        )
    try:
        assert child.stdout is not None
        for line in child.stdout:
            tell(_step(line))
        status = child.wait()
    finally:
        child.kill()
        child.communicate()
        children.forget(child)
    return _outcome(job, status)


def _step(line: bytes) -> str:
    try:
        step = json.loads(line)
        return f"{step['phase']} {step['step']}/{step['steps']}"
    except (ValueError, KeyError, TypeError):
        return line.decode(errors="replace").strip()


def _outcome(job: Job, status: int) -> Built:
    if status < 0:
        raise ExportError(f"the builder crashed with {signal.Signals(-status).name}; see {job.log}")
    try:
        result = json.loads(Path(job.result).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ExportError(f"the builder ended with status {status} and no result: {last_error(job.log)}") from None
    if result["error"] is not None:
        raise ExportError(f"{result['error']}; see {job.log}{_hint(job)}")
    return Built(result["seconds"], result["peak_bytes"], result["kernels"])


def last_error(log: str) -> str:
    """The last line of a log that speaks of an error, or the last line; where the log is."""
    text = Path(log).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return f"{(errors or lines or ['it printed nothing'])[-1]}; see {log}"


def _hint(job: Job) -> str:
    """What TensorRT printed past its logger."""
    with Path(job.log).open(encoding="utf-8", errors="replace") as log:
        found = [line[line.index("Internal Error") :].strip() for line in log if "Internal Error" in line]
    return f" ({found[-1][:300]})" if found else ""
