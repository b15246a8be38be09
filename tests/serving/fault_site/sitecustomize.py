"""On the PYTHONPATH of a server under test, this lets a signal make its ranks fail as a bug of their own would."""

import sys

if "stepvideo_serve.parallel.rank_process" in sys.orig_argv:
    from tests.parallel.failing import fail_at_signals

    fail_at_signals()
