"""The same work on many items, some at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

JOBS = 2  # clips at a time, if nothing else is said: each takes a processor and some hundred MB


def in_parallel(work: Callable[[T], R], items: Sequence[T], jobs: int, said: Callable[[int], None]) -> list[R]:
    """What `work` gives for each item, in their order, on `jobs` threads: decoding and OpenCV let go of Python's lock.

    said: called with the number of items done. Raises what `work` raises; after that, and after Ctrl-C, only what had
    begun is finished.
    """
    found: list[R] = []
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="worker")
    try:
        for one in pool.map(work, items):
            found.append(one)
            said(len(found))
        return found
    finally:
        pool.shutdown(cancel_futures=True)
