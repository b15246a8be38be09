"""The checks before a rank takes its GPU: are there enough GPUs, who may use them, do they reach each other."""

import ctypes
import logging
from collections.abc import Collection
from typing import Protocol

import torch

from stepvideo_serve.errors import SetupError
from stepvideo_serve.parallel.layout import Layout

# values of CUdevice_attribute and CUcomputemode in cuda.h
COMPUTE_MODE = 20
DEFAULT, PROHIBITED, EXCLUSIVE_PROCESS = 0, 2, 3
MODES = {PROHIBITED: "PROHIBITED", EXCLUSIVE_PROCESS: "EXCLUSIVE_PROCESS"}
SHARED_GPU = 0
"""The GPU of rank 0, which the models beside the ranks use, too, unless they are given others."""

_logger = logging.getLogger(__name__)


class Gpus(Protocol):
    """What a driver says of the GPUs of this process."""

    def count(self) -> int:
        """How many there are."""
        ...

    def compute_mode(self, index: int) -> int:
        """One of CUcomputemode; DEFAULT where the driver does not say."""
        ...

    def reaches(self, index: int, other: int) -> bool:
        """Whether GPU `index` can read and write the memory of GPU `other` (P2P)."""
        ...


class DriverGpus:
    """Asks torch and the driver, and makes no context on any GPU."""

    def count(self) -> int:
        return torch.cuda.device_count()

    def compute_mode(self, index: int) -> int:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return DEFAULT
        device, mode = ctypes.c_int(), ctypes.c_int()
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index)
        failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(mode), COMPUTE_MODE, device)
        return DEFAULT if failed else mode.value

    def reaches(self, index: int, other: int) -> bool:
        return bool(torch.cuda.can_device_access_peer(index, other))


def check_gpus(layout: Layout, rank: int, gpus: Gpus, shared: Collection[int] = (SHARED_GPU,)) -> None:
    """Raises ConfigError when there are fewer GPUs than ranks, SetupError when the mode of this rank's GPU keeps it or
    the other models out. GPUs that cannot reach each other are said in the log: they work, by way of the host.
    shared: the GPUs that models beside the ranks use."""
    layout.check_devices(gpus.count())
    mode = gpus.compute_mode(rank)
    if mode == PROHIBITED or (mode == EXCLUSIVE_PROCESS and rank in shared):
        users = f"rank {rank} and the models beside it" if rank in shared else f"rank {rank}"
        raise SetupError(
            f"GPU {rank} must be open to {users}, its compute mode is {MODES[mode]}: nvidia-smi -i {rank} -c DEFAULT."
        )
    if others := apart(layout, rank, gpus):
        _logger.warning(
            "GPU %d cannot reach the memory of GPU %s (P2P): what they exchange goes through the host, slowly; see "
            "nvidia-smi topo -p2p r",
            rank,
            ", ".join(map(str, others)),
        )


def apart(layout: Layout, rank: int, gpus: Gpus) -> list[int]:
    """The GPUs of this rank's partners whose memory its GPU cannot reach."""
    partners = {other for axis in ("cfg", "tp", "sp") for other in layout.group(axis, rank)} - {rank}
    return sorted(other for other in partners if not gpus.reaches(rank, other))
