"""Memory and CPU time of a server's processes while it works, and whether the memory grows."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

RANK = "stepvideo_serve.parallel.rank_process"
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """At `requests` ended requests. Resident bytes of the server and its models; of the ranks; bytes in /dev/shm."""

    requests: int
    server: int
    ranks: int
    shm: int


def ranks_of(pid: int) -> list[psutil.Process]:
    """The rank processes of the server with this pid; while they are started anew, some are missing."""
    return [process for process in psutil.Process(pid).children(recursive=True) if RANK in _command(process)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def cpu_seconds(pid: int) -> float:
    """That the server with this pid and its living processes have used."""
    server, total = psutil.Process(pid), 0.0
    for process in (server, *server.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has just ended
            times = process.cpu_times()
            total += times.user + times.system
    return total


def sample(pid: int, shm_prefix: str, requests: int) -> Sample:
    """`shm_prefix`: what the names of the server's files in /dev/shm begin with."""
    resident = {True: 0, False: 0}
    server = psutil.Process(pid)
    for process in (server, *server.children(recursive=True)):
        try:
            resident[RANK in _command(process)] += process.memory_info().rss
        except psutil.Error:
            continue
    shm = 0
    for path in Path("/dev/shm").glob(f"{shm_prefix}*"):
        try:
            shm += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return Sample(requests, resident[False], resident[True], shm)


class Sampler:
    """A thread that takes a sample every `every_s`, as a context manager."""

    def __init__(self, pid: int, shm_prefix: str, requests: Callable[[], int], every_s: float = 0.5) -> None:
        self.samples: list[Sample] = []
        self._pid, self._shm_prefix, self._requests = pid, shm_prefix, requests
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            began_s = time.monotonic()
            self.samples.append(sample(self._pid, self._shm_prefix, self._requests()))
            self._ended.wait(max(0.0, began_s + self._every_s - time.monotonic()))


def slope(requests: Sequence[int], values: Sequence[int]) -> float:
    """MiB per 100 requests: least squares over the samples of the second half of the requests; NaN below 3 samples or
    where no request ended among them."""
    x, y = np.array(requests, np.float64), np.array(values, np.float64)
    late = x >= x.max(initial=0.0) / 2
    if np.count_nonzero(late) < 3 or np.ptp(x[late]) == 0:
        return float("nan")
    return float(np.polyfit(x[late], y[late], 1)[0] * 100 / MIB)
