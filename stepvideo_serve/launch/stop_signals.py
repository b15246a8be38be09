"""The signals that tell a launcher to stop. Each begins what stopping.py describes, by way of the context managers.

SIGTERM     from Docker, Kubernetes, systemd, kill; once more: at once
SIGINT      Ctrl-C, which Python makes a KeyboardInterrupt; once more: at once
SIGHUP      the terminal was closed, or the connection to it was lost; never hastens a stop that has begun, because
            the end of a session sends SIGTERM and SIGHUP together. Ignored where it was before, as by nohup
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

ONE_ACT_S = 1.0  # a SIGTERM that comes so soon after SIGHUP means the same
PR_SET_PDEATHSIG = 1


class _StopSignals:
    """The handlers, and what they remember."""

    def __init__(self) -> None:
        self._hung_up_s: float | None = None
        self._told = False

    def hang_up(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if not self._told:
            self._told, self._hung_up_s = True, time.monotonic()
            raise SystemExit(128 + number)

    def terminate(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._hung_up_s is not None and time.monotonic() - self._hung_up_s < ONE_ACT_S:
            return
        self._told = True
        raise SystemExit(128 + number)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        signal.default_int_handler(number, frame)


def heed_stop_signals() -> None:
    """From now on a signal ends this process by SystemExit or KeyboardInterrupt, raised in the main thread."""
    handlers = _StopSignals()
    signal.signal(signal.SIGTERM, handlers.terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's job in the background ignores it
        signal.signal(signal.SIGINT, handlers.interrupt)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, handlers.hang_up)


def say(line: str) -> None:
    """A line on standard error, where there still is one: a closed terminal takes nothing."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        return


def die_with_parent() -> Callable[[], None]:
    """What a child does between fork and exec, so that SIGTERM comes when its parent ends; the library is loaded here,
    because a fork must not allocate much."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask_for_signal() -> None:
        if prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0 or os.getppid() != parent:
            os._exit(1)

    return ask_for_signal
