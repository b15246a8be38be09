"""One server of a batch, or one gateway: what is on its way there, and whether it may be sent more."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from stepvideo_client.evaluation.endpoint import Endpoint
from stepvideo_client.evaluation.flight import Flight, Job
from stepvideo_client.evaluation.retries import back_off_s

LONGEST_PAUSE_S = 60.0
UNDER_WAY = (
    2  # one on the ranks, and one before or behind them: where decoding is the slowest, more would pile up there
)


@dataclass(eq=False)
class Lane:
    """waiting: how many clips may wait on a server behind the one that it works on. One is enough to keep its ranks
    busy, since the next is sent as soon as that one begins; more only take places from other callers. A gateway may
    have so many for each of its servers, or one of these would have none while the clip at another waits.

    trouble: failures in a row; heard_s: when the server was last heard of, on the clock of time.monotonic.
    """

    url: str
    connect: Callable[[str], Endpoint]
    waiting: int
    flights: list[Flight] = field(default_factory=list)
    trouble: int = 0
    free_at_s: float = 0.0
    heard_s: float = field(default_factory=time.monotonic)

    def has_room(self, now_s: float) -> bool:
        """Whether another clip may be sent now."""
        may_wait = self.servers * self.waiting
        most = self.servers * UNDER_WAY + may_wait
        return now_s >= self.free_at_s and self.waiting_now < may_wait and len(self.flights) < most

    @property
    def servers(self) -> int:
        """How many there are behind it, as the youngest flight that knows was told."""
        return next((flight.servers for flight in reversed(self.flights) if flight.servers), 1)

    @property
    def waiting_now(self) -> int:
        """How many of its clips have not begun."""
        return sum(not flight.begun for flight in self.flights)

    def take_off(self, job: Job) -> Flight:
        """A clip, about to be asked for on a connection of its own. Raises InvalidInput."""
        flight = Flight(job, self.url, self.connect(self.url))
        self.flights.append(flight)
        return flight

    def land(self, flight: Flight) -> None:
        """The flight has ended well, or was cancelled here."""
        self._leave(flight)
        if flight.clip is not None:
            self.trouble = 0

    def fail(self, flight: Flight, answered: bool) -> float:
        """The flight has failed: the lane rests for a while, longer each time. answered: by the server. Returns the
        seconds."""
        self._leave(flight)
        self.trouble += 1
        now_s = time.monotonic()
        pause_s = back_off_s(self.trouble, LONGEST_PAUSE_S)
        self.free_at_s = max(self.free_at_s, now_s + pause_s)
        if answered:
            self.heard_s = now_s
        return pause_s

    def last_heard_s(self) -> float:
        """When anything came from the server, a step's news too."""
        return max((self.heard_s, *(flight.heard_s for flight in self.flights)))

    def _leave(self, flight: Flight) -> None:
        self.flights.remove(flight)
        self.heard_s = max(self.heard_s, flight.heard_s)
