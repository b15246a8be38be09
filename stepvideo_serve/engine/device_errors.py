"""Which errors of CUDA end a process.

After an illegal access, a failed launch or a fault of the hardware the CUDA context is lost: every later call of the
process fails, whoever makes it. Kernels run behind the host, so the error comes from any later call: as
torch.AcceleratorError from torch, in other words from cuBLAS or NCCL, as a refusal from TensorRT. Whatever the error
is, CUDA is therefore asked. Lack of memory leaves the context whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stepvideo_serve.errors import DeviceLost, RequestError

OUT_OF_MEMORY = "CUDA error: out of memory"  # how cudaErrorMemoryAllocation reads


@contextmanager
def device_errors(device: torch.device | None = None) -> Iterator[None]:
    """Around everything that uses the GPU: an error that CUDA will not get over leaves as DeviceLost. device: the GPU
    that is asked; None or without a number: the thread's current one."""
    try:
        yield
    except (DeviceLost, RequestError):
        raise
    except Exception as error:
        reason = _first_line(error) if _loses_device(error) else lost_context(device)
        if reason is None:
            raise
        raise _lost(f"{type(error).__name__}: {_first_line(error)}", reason) from error


def require_context(what: str, device: torch.device | None = None) -> None:
    """Raises DeviceLost, saying what was noticed, where CUDA's context is lost; waits for nothing. device: as in
    `device_errors`."""
    reason = lost_context(device)
    if reason is not None:
        raise _lost(what, reason)


def lost_context(device: torch.device | None = None) -> str | None:
    """What CUDA says is wrong in this process; None where all is well, or CUDA is not in use. Asking about a GPU that
    the process does not use would take memory there."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.current_stream(device).query()
    except torch.AcceleratorError as error:
        return _first_line(error) if _loses_device(error) else None
    return None


def _loses_device(error: BaseException) -> bool:
    return isinstance(error, torch.AcceleratorError) and not str(error).startswith(OUT_OF_MEMORY)


def _lost(what: str, reason: str) -> DeviceLost:
    said = what if reason in what else f"{what}; CUDA says: {reason}"
    return DeviceLost(f"This process has lost its GPU and ends ({said.rstrip('.')}): send the request again.")


def _first_line(error: BaseException) -> str:
    """CUDA's errors go on with advice for who debugs torch."""
    return str(error).partition("\n")[0]
