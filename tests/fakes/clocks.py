"""Who may touch which memory when: vector clocks, as of a detector of data races, for the streams of one GPU.

Every stream is a timeline, and so is the host. What one timeline has seen of another is a number of its steps; an
access is in order when the timeline that makes it has seen all earlier accesses to the same bytes that it must follow:
a read follows the writes, a write follows the writes and the reads. The host sees a stream when it waits for it, a
stream sees the host when something is launched.
"""

from dataclasses import dataclass, field


class ContractError(AssertionError):
    """Something that the real libraries forbid, and do not notice."""


class Timeline:
    """A stream or the host. `seen`: timeline -> how many of its steps lie before the next step of this one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: dict[Timeline, int] = {self: 0}

    def follow(self, seen: "dict[Timeline, int]") -> None:
        """What was seen elsewhere (`snapshot`) lies before all that comes on this timeline."""
        for timeline, step in seen.items():
            self.seen[timeline] = max(self.seen.get(timeline, 0), step)

    def snapshot(self) -> "dict[Timeline, int]":
        return dict(self.seen)

    def step(self) -> int:
        self.seen[self] += 1
        return self.seen[self]


@dataclass(frozen=True)
class Access:
    """`what` did it, on bytes start .. stop."""

    timeline: Timeline
    step: int
    start: int
    stop: int
    what: str

    def lies_before(self, timeline: Timeline) -> bool:
        return timeline.seen.get(self.timeline, 0) >= self.step

    def touches(self, start: int, stop: int) -> bool:
        return self.start < stop and start < self.stop

    def lies_within(self, start: int, stop: int) -> bool:
        return start <= self.start and self.stop <= stop


@dataclass
class Block:
    """A piece of device memory and the accesses that a later one may have to follow."""

    start: int
    stop: int
    reads: list[Access] = field(default_factory=list)
    writes: list[Access] = field(default_factory=list)

    def read(self, access: Access) -> None:
        """Raises ContractError unless the writes lie before it."""
        self._require(self.writes, access, "read")
        covered = [
            one for one in self.reads if one.timeline is access.timeline and one.lies_within(access.start, access.stop)
        ]
        self.reads = [one for one in self.reads if one not in covered] + [access]

    def write(self, access: Access) -> None:
        """Raises ContractError unless the writes and the reads lie before it."""
        self._require(self.writes, access, "written")
        self._require(self.reads, access, "written")
        self.reads = [one for one in self.reads if not one.lies_within(access.start, access.stop)]
        self.writes = [one for one in self.writes if not one.lies_within(access.start, access.stop)] + [access]

    def out_of_order(self, timeline: Timeline) -> Access | None:
        """An access that does not lie before what comes on `timeline`."""
        return next((one for one in (*self.writes, *self.reads) if not one.lies_before(timeline)), None)

    def _require(self, earlier: list[Access], access: Access, verb: str) -> None:
        for one in earlier:
            if one.touches(access.start, access.stop) and not one.lies_before(access.timeline):
                raise ContractError(
                    f"{access.what} on {access.timeline.name}: memory is {verb} that {one.what} uses on "
                    f"{one.timeline.name}, and nothing orders the two."
                )
