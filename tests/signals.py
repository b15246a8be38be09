"""Children that heed Ctrl-C however the tests were started.

A shell starts its background jobs with SIGINT ignored, and every child inherits that: `interrupt` would do nothing.
"""

import signal
import subprocess
from collections.abc import Sequence
from typing import Any


def start(command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
    """Starts a command as a terminal would, with Ctrl-C not ignored; text pipes, and other options of Popen.

    To be called in the main thread. SIGINT is set here, not in a preexec_fn: with one, Popen forks, and gRPC in this
    process may abort the child.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, text=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt(process: "subprocess.Popen[str]") -> None:
    """Ctrl-C to a process of `start`."""
    process.send_signal(signal.SIGINT)
