"""A bound on the memory that pictures take while they are decoded, however many requests come at the same time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

# One picture of 64 megapixels in the costliest format (WebP: four copies) fits; see docs/load.md.
ROOM_BYTES: Final = 1280 << 20
_LOOK_EVERY_S: Final = 0.1


class DecodingRoom:
    """Lets pictures in while the bytes that they will take are below a bound; the others wait in order of arrival."""

    def __init__(self, total_bytes: int = ROOM_BYTES) -> None:
        self._total = total_bytes
        self._taken = 0
        self._waiting: list[object] = []
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int, check: Callable[[], object]) -> Iterator[None]:
        """Inside, `amount` bytes are taken; what is larger than the whole room is let in alone. While the caller waits
        `check()` is called ten times a second; what it raises ends the waiting."""
        amount = min(amount, self._total)
        self._enter(amount, check)
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()

    def _enter(self, amount: int, check: Callable[[], object]) -> None:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._waiting[0] is not ticket or self._taken + amount > self._total:
                    self._changed.wait(_LOOK_EVERY_S)
                    check()
                self._taken += amount
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
