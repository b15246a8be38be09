"""Children that heed Ctrl-C however the tests were started.

A shell starts its background jobs with SIGINT ignored, and every child inherits that: `interrupt` would do nothing.
"""

import signal
import subprocess
from collections.abc import Sequence
from typing import Any


def start(command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
    """Starts a command as a terminal would, with Ctrl-C not ignored; text pipes, and other options of Popen."""
    return subprocess.Popen(command, text=True, preexec_fn=_heed_ctrl_c, **options)


def interrupt(process: "subprocess.Popen[str]") -> None:
    """Ctrl-C to a process of `start`."""
    process.send_signal(signal.SIGINT)


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
