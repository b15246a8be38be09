"""One GPU in main memory: what is allocated, by whom, and in which order its streams touch it.

torch's allocator keeps what is freed, as the real one does, until `empty_cache`; what TensorRT allocates comes from
what is left. Addresses are multiples of 512, new memory is full of NaN, and freed memory must be used by no stream
that the current one has not seen.
"""

import weakref
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from tests.fakes.clocks import Access, Block, ContractError, Timeline

GRANULE = 512
POISONED_BYTES = 1 << 24  # larger blocks are left as they are: filling them would make them real
NOT_A_NUMBER = 0xFF
Range = tuple[int, int]
"""Address and size in bytes."""


class FakeGpu:
    """`total_bytes` of memory, of which others hold `taken_bytes`. `index`: of the device."""

    def __init__(self, total_bytes: int = 80 << 30, taken_bytes: int = 0, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self.total_bytes, self.taken_bytes = total_bytes, taken_bytes
        self.host = Timeline("the host")
        self.current = Timeline("the default stream")
        self.streams: dict[int, Timeline] = {0: self.current}
        self.live: dict[int, Block] = {}
        self.cached: dict[int, list[NDArray[np.uint8]]] = {}
        self.faults: list[ContractError] = []
        self.poison: Exception | None = None
        """After a sticky error: what every later call raises."""
        self._arriving: list[tuple[Timeline, int, Callable[[], object]]] = []

    def new_stream(self, name: str) -> int:
        """Its handle."""
        handle = len(self.streams) * 16
        self.streams[handle] = Timeline(name)
        return handle

    @property
    def free_bytes(self) -> int:
        live = sum(-(-max(block.stop - block.start, 1) // GRANULE) * GRANULE for block in self.live.values())
        cached = sum(len(one) for blocks in self.cached.values() for one in blocks)
        return self.total_bytes - self.taken_bytes - live - cached

    def allocate(self, size_bytes: int) -> NDArray[np.uint8]:
        """Memory of torch's allocator; freed with the array. Raises torch.OutOfMemoryError."""
        size = -(-max(size_bytes, 1) // GRANULE) * GRANULE
        kept = self.cached.get(size, [])
        if not kept and size > self.free_bytes:
            self.empty_cache()
        if not kept and size > self.free_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes. GPU 0 has {self.free_bytes} bytes free."
            )
        base = kept.pop() if kept else _aligned(size)
        view = base[:size_bytes]
        block = Block(base.ctypes.data, base.ctypes.data + size_bytes)
        self.live[block.start] = block
        weakref.finalize(view, self._freed, block, base).atexit = False
        if size <= POISONED_BYTES:
            base.fill(NOT_A_NUMBER)
        return view

    def empty_cache(self) -> None:
        """torch gives back what it keeps."""
        self.cached.clear()

    def launch(self, timeline: Timeline, what: str, reads: Iterable[Range] = (), writes: Iterable[Range] = ()) -> None:
        """Something that runs on a stream. Raises ContractError for memory that is not there or not in order."""
        self.check()
        timeline.follow(self.host.seen)
        step = timeline.step()
        for kind, ranges in (("read", reads), ("write", writes)):
            for start, size in ranges:
                if size:
                    block = self.block_of(start, size, what)
                    getattr(block, kind)(Access(timeline, step, start, start + size, what))

    def block_of(self, start: int, size: int, what: str) -> Block:
        """The live allocation that these bytes lie in."""
        for block in self.live.values():
            if block.start <= start and start + size <= block.stop:
                return block
        raise ContractError(f"{what}: {size} bytes at {start:#x} must lie in memory that is alive, they do not.")

    def synchronize(self, seen: dict[Timeline, int]) -> None:
        """The host waits for what a stream or an event has seen."""
        self.check()
        self.host.follow(seen)
        arrived = [one for one in self._arriving if self.host.seen.get(one[0], 0) >= one[1]]
        self._arriving = [one for one in self._arriving if one not in arrived]
        for _, _, arrive in arrived:
            arrive()

    def when_host_sees(self, timeline: Timeline, arrive: Callable[[], object]) -> None:
        """`arrive` happens when the host has waited for what is on a stream now."""
        self._arriving.append((timeline, timeline.seen[timeline], arrive))

    def check(self) -> None:
        """Raises what a finalizer could not, and the error that lost the device."""
        if self.poison is not None:
            raise self.poison
        if self.faults:
            raise self.faults[0]

    def _freed(self, block: Block, base: NDArray[np.uint8]) -> None:
        del self.live[block.start]
        self.cached.setdefault(len(base), []).append(base)
        # Everything that the program has seen to be done, and what the current stream will have done.
        seen = Timeline("the current stream")
        seen.follow(self.current.seen)
        seen.follow(self.host.seen)
        late = block.out_of_order(seen)
        if late is not None:
            self.faults.append(
                ContractError(
                    f"Memory is freed that {late.what} uses on {late.timeline.name}: the next tensor there may be "
                    "written before that has ended."
                )
            )


def _aligned(size: int) -> NDArray[np.uint8]:
    raw = np.empty(size + GRANULE, np.uint8)
    offset = -raw.ctypes.data % GRANULE
    return raw[offset : offset + size]
