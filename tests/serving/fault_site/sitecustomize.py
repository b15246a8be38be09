"""On the PYTHONPATH of a server under test, this lets a signal make its ranks fail as a bug of their own would, and
lets them start slowly."""

import os
import sys
import time
from pathlib import Path

if "stepvideo_serve.parallel.rank_process" in sys.orig_argv:
    from tests.parallel.failing import fail_at_signals

    fail_at_signals()
    slow_start = Path(os.environ.get("FAULT_SLOW_START", "/nonexistent"))
    if slow_start.exists():
        time.sleep(float(slow_start.read_text()))
