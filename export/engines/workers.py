"""Several builds at a time, each on a slot of its own, and all ended when the run is."""

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import TypeVar

from export.engines.gpus import Slot
from export.engines.process import Children

Result = TypeVar("Result")
Build = Callable[[str, Slot, Children], Result]
Ended = tuple[str, Future[Result]]


def build_all(
    names: Iterable[str], slots: Sequence[Slot], build: Build[Result]
) -> Generator[Ended[Result], None, None]:
    """Calls `build` for every name in a thread, as many at a time as there are slots; gives each name with what became
    of its build, in the order in which they end. Closed before all have ended, or interrupted, it ends the processes of
    those under way and begins no other."""
    free, children = SimpleQueue[Slot](), Children()
    for slot in slots:
        free.put(slot)

    def on_a_slot(name: str) -> Result:
        slot = free.get()
        try:
            return build(name, slot, children)
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        futures = {pool.submit(on_a_slot, name): name for name in names}
        try:
            for future in as_completed(futures):
                yield futures[future], future
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            children.end()
