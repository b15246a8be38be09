"""Tensors of a fake GPU: the program takes them for CUDA tensors, their values lie in the GPU's memory, which is main
memory.

Every operation of torch on them runs on the current stream: it reads its operands and writes its results there, and is
refused where operands of the CPU are among them. What goes to the CPU waits for the current stream. A build of torch
without CUDA has no place for CUDA tensors: below Python these are tensors of the CPU, and what Python asks about the
device, or moves from one to the other, is answered here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.fakes.gpu import FakeGpu, Range

Operator = Any
Collective = Callable[[Operator, Sequence[Any], dict[str, Any]], Any]
aten = torch.ops.aten
TO_HOST = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
UNFILLED = (aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default)
CPU = torch.device("cpu")


class DeviceTensor(Tensor):
    """`inner` holds the values."""

    inner: Any
    _device: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "DeviceTensor":
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,
        )
        made.inner, made._device = inner, device
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Operator, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{function} ran outside of the fake GPU")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def data_ptr(self) -> int:
        return self.inner.data_ptr() if self.numel() else 0

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> NoReturn:
        del force
        raise TypeError(
            f"can't convert {self._device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        del tensor_contents
        return f"{self.inner!r} on {self._device}"


class OnGpu(TorchDispatchMode):
    """Runs what torch is asked for on the fake GPU; `collective` what torch.distributed is asked for."""

    def __init__(self, gpu: FakeGpu, collective: Collective) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gpu, self._collective = gpu, collective

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and importing the compiler takes seconds

    def __torch_dispatch__(self, function: Operator, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        operands = [value for value in tree_flatten((args, given))[0] if isinstance(value, Tensor)]
        ours = [value for value in operands if isinstance(value, DeviceTensor)]
        target = given.get("device")
        to_gpu = isinstance(target, torch.device) and target.type == "cuda"
        if not ours and not to_gpu:
            return function(*args, **given)
        if function.namespace == "c10d":
            return self._collective(function, args, given)
        if function is aten.copy_.default and len(ours) != len(operands):
            return self._copied(*args)
        strangers = [one for one in operands if not isinstance(one, DeviceTensor) and one.dim()]
        if strangers:  # torch lets only single numbers of the CPU go with tensors of a GPU
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{self._gpu.device} and cpu, in {function}!"
            )
        if function in UNFILLED:
            given["device"] = torch.device("meta")  # as much memory may be asked for as a GPU has
        elif target is not None:
            given["device"] = CPU
        if function in TO_HOST:
            self.read_by_host(*ours)
        where = {one.device for one in ours} | ({self.of_number(torch.device(target))} if target and to_gpu else set())
        if len(where) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, found {where}, in {function}!")
        return self._run(function, args, given, ours, where.pop())

    def upload(self, tensor: Tensor, device: torch.device) -> DeviceTensor:
        """A copy of a tensor of the CPU; the host may change its own at once."""
        return self._new(tensor.clone(), "a copy to the GPU", [], self.of_number(device))

    def of_number(self, device: torch.device) -> torch.device:
        """ "cuda" is the current GPU."""
        return self._gpu.device if device.index is None else device

    def download(self, tensor: DeviceTensor) -> Tensor:
        self.read_by_host(tensor)
        value: Tensor = tensor.inner.clone()
        return value

    def read_by_host(self, *tensors: Tensor) -> None:
        self._gpu.launch(self._gpu.current, "a copy to the host", ranges_of(tensors))
        self._gpu.synchronize(self._gpu.current.seen)

    def _copied(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Between the CPU and the GPU. What the host does not wait for is there when it has waited."""
        current = self._gpu.current
        if isinstance(to, DeviceTensor):
            self._gpu.launch(current, "a copy to the GPU", [], ranges_of([to]))
            to.inner.copy_(source)
        elif non_blocking:
            self._gpu.launch(current, "a copy to the host", ranges_of([source]))
            value = _inner(source).clone()
            self._gpu.when_host_sees(current, lambda: to.copy_(value))
            to.fill_(torch.nan if to.is_floating_point() else 0)
        else:
            self.read_by_host(source)
            to.copy_(_inner(source))
        return to

    def _run(
        self, function: Operator, args: Any, given: dict[str, Any], ours: list[DeviceTensor], on: torch.device
    ) -> Any:
        changed = [value for value in _changed(function, args, given) if isinstance(value, DeviceTensor)]
        if changed:
            self._gpu.launch(self._gpu.current, str(function), ranges_of(ours), ranges_of(changed))
        else:
            self._gpu.check()
        result = function(*tree_map(_inner, args), **tree_map(_inner, given))
        by_inner = {id(value.inner): value for value in ours}
        storages = {value.inner.untyped_storage()._cdata for value in ours}

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in by_inner:
                return by_inner[id(value)]
            if value.untyped_storage()._cdata in storages:
                return DeviceTensor(value, on)
            return self._new(value, str(function), ranges_of(ours), on, filled=function not in UNFILLED)

        return tree_map(wrapped, result)

    def _new(self, value: Tensor, what: str, reads: list[Range], on: torch.device, filled: bool = True) -> DeviceTensor:
        """The value in new memory of the GPU, as a kernel wrote it."""
        flat = torch.from_numpy(self._gpu.allocate(value.untyped_storage().nbytes())).view(value.dtype)
        inner = flat.as_strided(value.shape, value.stride(), value.storage_offset())
        made = DeviceTensor(inner, on)
        if filled:
            self._gpu.launch(self._gpu.current, what, reads, ranges_of([made]))
            inner.copy_(value)
        return made


class AskedForGpu(TorchFunctionMode):
    """What Python says of devices: which GPU "cuda" is, and what moves from one device to the other."""

    def __init__(self, gpu: FakeGpu, on_gpu: OnGpu) -> None:
        super().__init__()
        self._gpu, self._on_gpu = gpu, on_gpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        given.pop("pin_memory", None)  # all memory of the host is as good
        if function is Tensor.cpu and isinstance(args[0], DeviceTensor):
            return self._on_gpu.download(args[0])
        if function is Tensor.to:
            device, dtype, _, _ = torch._C._nn._parse_to(*args[1:], **given)
            if device is not None:
                return self._moved(args[0], device, dtype)
        if function is torch.tensor and self._means_gpu(given.get("device")):
            device = torch.device(given["device"])
            return self._on_gpu.upload(torch.tensor(*args, **{**given, "device": CPU}), device)
        if self._means_gpu(given.get("device")):
            given["device"] = self._on_gpu.of_number(torch.device(given["device"]))
        return function(*args, **given)

    def _moved(self, tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """As Tensor.to: nothing is copied that is there in that dtype."""
        if device.type == "cuda" and not isinstance(tensor, DeviceTensor):
            tensor = self._on_gpu.upload(tensor, device)
        elif device.type == "cuda" and tensor.device != self._on_gpu.of_number(device):
            raise AssertionError(f"Nothing goes from one GPU to another, {tensor.device} to {device}, in one process.")
        elif device.type == "cpu" and isinstance(tensor, DeviceTensor):
            tensor = self._on_gpu.download(tensor)
        elif device.type not in ("cuda", "cpu"):
            return Tensor.to(tensor, device)
        return tensor if dtype is None else Tensor.to(tensor, dtype)

    def _means_gpu(self, device: Any) -> bool:
        return device is not None and torch.device(device).type == "cuda"


def ranges_of(tensors: Sequence[Any]) -> list[Range]:
    """From the first to the last element of each."""
    found = []
    for tensor in tensors:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            found.append((tensor.data_ptr(), (last + 1) * tensor.element_size()))
    return found


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value


def _changed(function: Operator, args: Sequence[Any], given: dict[str, Any]) -> Iterator[Any]:
    """The operands that an operator writes to."""
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_flatten(args[index] if index < len(args) else given.get(argument.name))[0]
