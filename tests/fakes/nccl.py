"""An asynchronous stand-in for NCCL: gloo moves the tensors of a fake GPU while the program goes on.

A collective follows what the current stream has before it, as NCCL's own stream does, and ends whenever gloo's threads
are done with it. Only `wait` puts the current stream behind it; what reads the result before, or writes what is being
sent, is out of order.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch._C._distributed_c10d import PythonCallbackWork, Work
from torch.utils._pytree import tree_map

from tests.fakes.clocks import ContractError, Timeline
from tests.fakes.device_tensor import DeviceTensor, ranges_of
from tests.fakes.gpu import FakeGpu

# Operator -> which arguments it reads, and which it writes.
COLLECTIVES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "allreduce_": ((0,), (0,)),
    "alltoall_base_": ((1,), (0,)),
    "_allgather_base_": ((1,), (0,)),
    "send": ((0,), ()),
    "recv_": ((), (0,)),
}


class FakeNccl:
    """Runs the collectives of one GPU's tensors."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self._stream = Timeline("NCCL's stream")

    def __call__(self, function: Any, args: Sequence[Any], given: dict[str, Any]) -> Any:
        name = function._schema.name.removeprefix("c10d::")
        if name not in COLLECTIVES:
            raise ContractError(f"torch.distributed.{name} on tensors of a GPU is not among what the product uses.")
        read, written = ([t for i in part for t in _tensors(args[i])] for part in COLLECTIVES[name])
        self._stream.follow(self._gpu.current.seen)
        self._gpu.launch(self._stream, f"the collective {name}", ranges_of(read), ranges_of(written))
        ended = self._stream.snapshot()
        result = function(*tree_map(_inner, args), **given)
        boxed = result[-1] if isinstance(result, tuple) else result
        moving = Work.unbox(boxed)
        held = [*read, *written]  # as NCCL's work holds its tensors until it is waited for

        def wait(timeout: Any) -> bool:
            del timeout
            moving.wait()
            held.clear()
            self._gpu.current.follow(ended)
            return True

        made = PythonCallbackWork(wait).boxed()
        return (args[0], made) if isinstance(result, tuple) else made


@contextmanager
def gloo_for_nccl() -> Any:
    """Process groups that are asked for NCCL get gloo: what moves the tensors here."""
    init = dist.init_process_group

    def init_process_group(backend: str, **options: Any) -> None:
        init(backend.replace("nccl", "gloo"), **options)

    with patch.object(dist, "init_process_group", init_process_group):
        yield


def _tensors(value: Any) -> list[DeviceTensor]:
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if isinstance(item, DeviceTensor)]


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value
