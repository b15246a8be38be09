"""How the ranks of one generation find each other: torch.distributed's file store in memory without a name.

The parent makes the memory anew for every generation and hands it down (ranks.py), so no key of a former generation is
ever seen, no port is needed, and nothing is left behind: the memory is gone with the last process that has it open.
"""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any


def init_process_group(settings: Mapping[str, Any], backend: str, timeout_s: float) -> None:
    """Join the default process group of the generation; to be called by every rank, once.

    `settings` are what the rank's factory is given (rank, world_size, rendezvous). `timeout_s` limits the meeting and
    every gloo collective; it should be longer than any step, since the parent is the one that looks for stuck ranks.
    All ranks are on this machine: gloo talks over the loopback interface.

    Raises torch.distributed.DistError when the others do not come.
    """
    import torch.distributed as dist  # here, so that the parent can do without torch

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        backend,
        init_method=f"file://{settings['rendezvous']}",
        rank=settings["rank"],
        world_size=settings["world_size"],
        timeout=timedelta(seconds=timeout_s),
    )
