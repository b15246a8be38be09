"""Ways in which a process fails by itself, set off by a signal or by a call. Light to import: ranks do it early."""

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

LATE_S = 4
SLOW_STEP_S = 75  # longer than a minute, after which a cancelled group once was torn down
SIGNALS = {
    "exception": signal.SIGUSR1,
    "out of memory": signal.SIGUSR2,
    "late heartbeat": signal.SIGHUP,
    "no heartbeat": signal.SIGVTALRM,
    "CUDA error": signal.SIGPROF,
    "TensorRT refuses": signal.SIGIO,
    "slow step": signal.SIGALRM,
}
LOST_DEVICE = ("CUDA error", "TensorRT refuses")
"""How a process learns that its GPU is lost; from then on all that uses the GPU fails."""
ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"
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
    elif how in LOST_DEVICE:
        lose_device(how)
    elif how == "slow step":
        time.sleep(SLOW_STEP_S)
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


def lose_device(how: str) -> None:
    """As soon as the modules are there that use it: this process may only have begun to import them."""
    if _has_runners():
        _lose_device(how)
    else:
        threading.Thread(target=_lose_later, args=(how,), daemon=True).start()


def use_device() -> None:
    """What stands for a kernel where there are no graphs."""
    torch = sys.modules["torch"]
    if hasattr(torch.cuda, "fail_here"):
        torch.cuda.fail_here()


def _has_runners() -> bool:
    runner = sys.modules.get("stepvideo_serve.engine.runner")
    return hasattr(runner, "EagerRunner") or "gloo_ranks" in sys.modules


def _lose_later(how: str) -> None:
    while not _has_runners():
        time.sleep(0.01)
    _lose_device(how)


def _lose_device(how: str) -> None:
    """Without a GPU: every graph fails, and CUDA says why when it is asked."""
    import torch

    from stepvideo_serve.engine.runner import EngineRunner

    def illegal_access() -> NoReturn:
        raise torch.AcceleratorError(f"{ILLEGAL_ACCESS}\nCUDA kernel errors might be reported later.")

    def fail_here(*_: Any, **__: Any) -> None:
        if how == "CUDA error":
            illegal_access()
        from stepvideo_serve.engine.nvinfer import NvInferRunner

        said = SimpleNamespace(last_error="Error Code 1: Cuda Runtime (an illegal memory access was encountered)")
        runner = SimpleNamespace(_logger=said, spec=SimpleNamespace(name="dit_block", profile=dict))
        raise NvInferRunner._refused(runner, {})  # type: ignore[arg-type]

    stream = SimpleNamespace(query=illegal_access)
    changes = {"is_initialized": lambda: True, "current_stream": lambda *_: stream, "fail_here": fail_here}
    for name, value in changes.items():
        setattr(torch.cuda, name, value)
    setattr(EngineRunner, "__call__", fail_here)  # noqa: B010  # which is final
