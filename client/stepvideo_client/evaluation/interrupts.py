"""Ctrl-C during a batch: the first lets what runs end, the second cancels. SIGTERM cancels at once."""

import signal
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Self


@dataclass
class Interrupts:
    """A context, of the main thread only. finish: nothing new is to be sent; cancel: what runs is to be cancelled."""

    count: int = 0
    terminated: bool = False
    _before: dict[int, Any] = field(default_factory=dict)

    @property
    def finish(self) -> bool:
        return self.count > 0 or self.terminated

    @property
    def cancel(self) -> bool:
        return self.count > 1 or self.terminated

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            self.count += 1
        else:
            self.terminated = True
