"""torch.cuda on the fake GPU: the functions and classes that the product uses, and no others."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from tests.fakes.device_tensor import AskedForGpu, Collective, OnGpu
from tests.fakes.gpu import FakeGpu


class FakeCuda:
    """`sm` of the GPU, such as 90; `count` of GPUs that the process sees."""

    def __init__(self, gpu: FakeGpu, sm: int = 90, count: int = 1) -> None:
        self.gpu, self.sm, self.count = gpu, sm, count

    @contextmanager
    def installed(self, collective: Collective) -> Iterator[None]:
        """torch.cuda, and tensors of device "cuda", in this thread."""
        names = {name: getattr(self, name) for name in PATCHED}
        on_gpu = OnGpu(self.gpu, collective)
        with (
            patch.multiple(torch.cuda, _lazy_init=lambda: None, **names),
            patch.object(torch, "Generator", Generator),
            on_gpu,
            AskedForGpu(self.gpu, on_gpu),
        ):
            yield

    def Stream(self, device: Any = None) -> "FakeStream":  # noqa: N802
        del device
        return FakeStream(self.gpu, self.gpu.new_stream(f"stream {len(self.gpu.streams)}"))

    def Event(self, enable_timing: bool = False, blocking: bool = False) -> "FakeEvent":  # noqa: N802
        del blocking
        return FakeEvent(self.gpu, enable_timing)

    def current_stream(self, device: Any = None) -> "FakeStream":
        del device
        return FakeStream(self.gpu, 0)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.count

    def can_device_access_peer(self, device: int, other: int) -> bool:
        return max(device, other) < self.count

    def current_device(self) -> int:
        return int(self.gpu.device.index)

    def set_device(self, device: Any) -> None:
        index = torch.device("cuda", device).index if isinstance(device, int) else torch.device(device).index
        if index >= self.count:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        self.gpu.device = torch.device("cuda", index)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        """The current GPU meanwhile."""
        before = self.gpu.device
        self.set_device(device)
        try:
            yield
        finally:
            self.gpu.device = before

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        del device
        return divmod(self.sm, 10)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        del device
        self.gpu.check()
        return self.gpu.free_bytes, self.gpu.total_bytes

    def empty_cache(self) -> None:
        self.gpu.check()
        self.gpu.empty_cache()

    def synchronize(self, device: Any = None) -> None:
        del device
        for timeline in self.gpu.streams.values():
            self.gpu.synchronize(timeline.seen)


PATCHED = [name for name in vars(FakeCuda) if not name.startswith("_") and name != "installed"]


class Generator(torch.Generator):
    """Random numbers of the GPU are those of the CPU."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        del device
        return super().__new__(cls)


class FakeStream:
    """A handle and its timeline."""

    def __init__(self, gpu: FakeGpu, handle: int) -> None:
        self._gpu, self.cuda_stream = gpu, handle
        self._timeline = gpu.streams[handle]

    def wait_stream(self, other: "FakeStream") -> None:
        self._gpu.check()
        self._timeline.follow(other._timeline.seen)

    def wait_event(self, event: "FakeEvent") -> None:
        self._timeline.follow(event.seen)

    def record_event(self, event: "FakeEvent | None" = None) -> "FakeEvent":
        event = event or FakeEvent(self._gpu, False)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._gpu.synchronize(self._timeline.seen)

    def query(self) -> bool:
        """Whether all is done: what was launched is, here."""
        self._gpu.check()
        return True


class FakeEvent:
    """What a stream had before it when the event was recorded."""

    def __init__(self, gpu: FakeGpu, enable_timing: bool) -> None:
        self._gpu, self._timing = gpu, enable_timing
        self.seen: dict[Any, int] = {}
        self._at_s: float | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        self._gpu.check()
        timeline = self._gpu.current if stream is None else stream._timeline
        self.seen, self._at_s = timeline.snapshot(), time.perf_counter()

    def wait(self, stream: FakeStream | None = None) -> None:
        (self._gpu.current if stream is None else stream._timeline).follow(self.seen)

    def query(self) -> bool:
        """Whether it is done, which the host then knows."""
        self._gpu.synchronize(self.seen)
        return True

    def synchronize(self) -> None:
        self._gpu.synchronize(self.seen)

    def elapsed_time(self, other: "FakeEvent") -> float:
        """Milliseconds; both events must have been recorded with timing, and waited for."""
        if not (self._timing and other._timing) or self._at_s is None or other._at_s is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if any(self._gpu.host.seen.get(timeline, 0) < step for timeline, step in other.seen.items()):
            raise RuntimeError("CUDA error: device not ready")
        return (other._at_s - self._at_s) * 1000.0
