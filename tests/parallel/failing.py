"""Ways in which a process fails by itself, set off by a signal or by a call. Light to import: ranks do it early."""

import ctypes
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np

LATE_S = 4
SIGNALS = {
    "exception": signal.SIGUSR1,
    "out of memory": signal.SIGUSR2,
    "late heartbeat": signal.SIGHUP,
    "no heartbeat": signal.SIGVTALRM,
}
HOLD_THE_INTERPRETER = ctypes.PyDLL(None).sleep  # unlike CDLL, PyDLL does not let other threads run meanwhile


def fail_at_signals() -> None:
    """From now on each of SIGNALS makes this process fail, in its main thread."""
    for how, number in SIGNALS.items():
        signal.signal(number, lambda *_, how=how: fail(how))


def fail(how: str) -> None:
    """One of the faults of tests/parallel/faults.py, in this process."""
    if how == "SIGSEGV":
        ctypes.string_at(0)
    elif how.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[how])
    elif how == "exception":
        raise ValueError("a bug")
    elif how == "out of memory":
        use_up_the_memory()
    elif how == "late heartbeat":
        HOLD_THE_INTERPRETER(LATE_S)
    elif how == "no heartbeat":
        HOLD_THE_INTERPRETER(3600)
    elif how == "stuck":
        time.sleep(3600)
    else:
        raise KeyError(how)


def use_up_the_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), resource.RLIM_INFINITY))
    taken = []
    while True:
        taken.append(np.ones(1 << 20))
