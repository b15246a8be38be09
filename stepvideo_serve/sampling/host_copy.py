"""Tensors on their way from the device of the loop to the host, while both go on."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor on the host; of a CPU's tensor, the tensor itself.

    From a GPU it is begun in the order of the current stream, into pinned memory, and waits for nothing until it is
    asked for. The tensor must not be written to before.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # not to be freed before it was read
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)  # whoever waits leaves the interpreter to others
            self._arrived.record()
        else:
            self._host = tensor.cpu()

    def wait(self) -> Tensor:
        """The copy, once it is there: all that the GPU was to do before is done then, too."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


def steps_behind(device: torch.device) -> int:
    """How many steps are begun before the last one is looked at: one where the device works while the host goes on."""
    return 1 if device.type == "cuda" else 0
