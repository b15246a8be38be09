"""What holds for all runs of a queue, and the share of URGENT runs."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class QueueRules:
    """max_waiting: how many may wait behind the one under way, None: any number. max_parks: how often one run may be
    parked. aging_s: seconds since it was accepted that raise a run by one priority. max_urgent: how many URGENT runs
    may wait, None: any number. urgent_credit_s: for how many seconds URGENT runs may go first while others wait; beyond
    them each second of an URGENT run is owed to the others."""

    max_waiting: int | None
    max_parks: int = 0
    aging_s: float = 600.0
    max_urgent: int | None = None
    urgent_credit_s: float = 60.0


class UrgentShare:
    """Keeps URGENT runs from having the ranks for themselves: their seconds while other runs waited are a debt, which
    the turns of other runs pay back. The caller holds the queue's lock."""

    def __init__(self, credit_s: float) -> None:
        self._credit_s = credit_s
        self._debt_s = 0.0
        self._began_s: float | None = None
        self._sign = 0.0

    def begin(self, urgent: bool, others_wait: bool) -> None:
        """A turn begins."""
        self._began_s = time.monotonic()
        self._sign = (1.0 if others_wait else 0.0) if urgent else -1.0

    def end(self) -> None:
        """The turn has ended, if there was one."""
        self._debt_s, self._began_s = self._now_s(), None

    @property
    def exhausted(self) -> bool:
        """Whether the debt is above the credit, so that other runs go first."""
        return self._now_s() > self._credit_s

    def _now_s(self) -> float:
        took_s = 0.0 if self._began_s is None else time.monotonic() - self._began_s
        return max(self._debt_s + self._sign * took_s, 0.0)
