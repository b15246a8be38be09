"""Free memory of a GPU. The driver frees the memory of a process a while after its end: ranks and servers that are
started anew therefore wait for it."""

import logging
import time

import torch

PATIENCE_S = 60.0
LOOK_S = 0.5

_logger = logging.getLogger(__name__)


def free_memory(device: torch.device, needed_bytes: int, patience_s: float = PATIENCE_S) -> int:
    """Waits until `needed_bytes` are free, `patience_s` at most; returns the free bytes."""
    deadline_s = time.monotonic() + patience_s
    free, told = torch.cuda.mem_get_info(device)[0], False
    while free < needed_bytes and time.monotonic() < deadline_s:
        if not told:
            _logger.warning(
                "%.1f GiB of GPU memory are needed, %.1f are free: waiting %g s at most for memory of processes "
                "that have ended",
                needed_bytes / 2**30,
                free / 2**30,
                patience_s,
            )
            told = True
        time.sleep(LOOK_S)
        free = torch.cuda.mem_get_info(device)[0]
    return free
