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
def device_errors() -> Iterator[None]:
    """Around everything that uses the GPU: an error that CUDA will not get over leaves as DeviceLost."""
    try:
        yield
    except (DeviceLost, RequestError):
        raise
    except Exception as error:
        reason = _first_line(error) if _loses_device(error) else lost_context()
        if reason is None:
            raise
        raise _lost(f"{type(error).__name__}: {_first_line(error)}", reason) from error


def require_context(what: str) -> None:
    """Raises DeviceLost, saying what was noticed, where CUDA's context is lost; waits for nothing."""
    reason = lost_context()
    if reason is not None:
        raise _lost(what, reason)


def lost_context() -> str | None:
    """What CUDA says is wrong in this process; None where all is well, or CUDA is not in use."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.current_stream().query()
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
