"""Whether answers that a server has given are still on their way to callers with slow connections.

A model has answered once Triton has its response; a large one may then need minutes on a slow line. The kernel knows:
what the other end has not taken stands in the send queue of its connection.
"""

import time
from collections.abc import Callable, Collection
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
OPEN = ("01", "08")  # established, and half closed by the other end
LOOK_S = 0.1
QUIET_S = 1.0  # between two writes of one response a queue may be empty for a moment


def undelivered(ports: Collection[int]) -> int:
    """How many connections to these ports of this machine have bytes that the other end has not taken."""
    count = 0
    for table in TABLES:
        try:
            rows = [line.split() for line in table.read_text(encoding="ascii").splitlines()[1:]]
        except OSError:  # a machine without this family of addresses
            continue
        for _, local, _, state, queues, *_ in rows:
            count += state in OPEN and int(local.rpartition(":")[2], 16) in ports and int(queues[:8], 16) > 0
    return count


def wait_until_delivered(
    ports: Collection[int], deadline_s: float, running: Callable[[], bool], quiet_s: float = QUIET_S
) -> None:
    """Returns when nothing was on its way for quiet_s, at deadline_s (time.monotonic()), or when the server is not
    `running` any more."""
    quiet_since_s = time.monotonic()
    while running() and (now_s := time.monotonic()) < deadline_s:
        if undelivered(ports):
            quiet_since_s, quiet_s = now_s, QUIET_S
        elif now_s - quiet_since_s >= quiet_s:
            return
        time.sleep(LOOK_S)
