"""torch's meta device in the place of a GPU: tensors have shapes only, and may not be mixed with those of the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

META = torch.device("meta")


class ReadableMeta(TorchFunctionMode):
    """Copies from the meta device to the CPU give zeros. `reads` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.cpu and args[0].device == META:
            self.reads += 1
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if function in (torch.isfinite, Tensor.all) and args[0].device == META:
            return torch.ones((), dtype=torch.bool)  # where values are asked for
        return function(*args, **(kwargs or {}))
