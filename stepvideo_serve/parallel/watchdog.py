"""Whether the ranks are well, judged by the times of their messages alone.

Times are those of time.monotonic() in the parent. When the parent itself was held up (a paused virtual machine, a
debugger), the ranks are excused for as long.
"""

MISSED_BEATS = 1.5  # heartbeats without a message: the rank is silent, and lost if the kernel says that it is stopped
DEAD_BEATS = 10  # heartbeats without a message: the rank is lost, whatever the kernel says


class Heartbeats:
    """When each rank last gave a sign of life: a beat or any other message."""

    def __init__(self, size: int, heartbeat_s: float, now_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._signs_s = [now_s] * size

    def sign(self, rank: int, now_s: float) -> None:
        self._signs_s[rank] = now_s

    def excuse(self, pause_s: float) -> None:
        self._signs_s = [sign_s + pause_s for sign_s in self._signs_s]

    def oldest_s(self, now_s: float) -> float:
        """How long ago the rank that has been silent for longest gave its last sign."""
        return now_s - min(self._signs_s)

    def silent(self, now_s: float) -> dict[int, float]:
        """The ranks that are silent, and for how many heartbeats they have been."""
        beats = {rank: (now_s - sign_s) / self._heartbeat_s for rank, sign_s in enumerate(self._signs_s)}
        return {rank: missed for rank, missed in beats.items() if missed > MISSED_BEATS}


class StepClock:
    """How long the steps of one job take. A step ends when its rank marks it; the first one begins with the job.

    first_step_timeout_s  how long the first step may take; None: no limit
    step_slack_s          how much longer than the longest so far a later step may take
    Ranks in lock-step wait for each other: a stuck rank has marked fewer steps than the others, or all are stuck.
    """

    def __init__(self, size: int, first_step_timeout_s: float | None, step_slack_s: float, now_s: float) -> None:
        self._first_step_timeout_s = first_step_timeout_s
        self._step_slack_s = step_slack_s
        self._marked_s = dict.fromkeys(range(size), now_s)  # of the ranks that have not ended the job
        self._steps = [0] * size
        self._longest_s = 0.0
        self._steps_when_told: list[int] | None = None

    def mark(self, rank: int, now_s: float) -> None:
        if rank in self._marked_s:
            self._longest_s = max(self._longest_s, now_s - self._marked_s[rank])
            self._marked_s[rank] = now_s
            self._steps[rank] += 1

    def ended(self, rank: int) -> None:
        """The rank's part of the job is over."""
        self._marked_s.pop(rank, None)

    def excuse(self, pause_s: float) -> None:
        for rank in self._marked_s:
            self._marked_s[rank] += pause_s

    def told_to_stop(self) -> None:
        """The ranks have been told to end the job; more calls do nothing."""
        self._steps_when_told = self._steps_when_told or self._steps.copy()

    def may_be_stopping(self) -> bool:
        """Whether the ranks that were told to stop are still in the step in which they were told, or in the next one,
        which they may have begun at that moment; and whether `stuck` watches over that step."""
        told = self._steps_when_told or self._steps
        unwatched = self._first_step_timeout_s is None
        running = [rank for rank in self._marked_s if self._steps[rank] > 0 or not unwatched]
        return running == list(self._marked_s) and all(self._steps[rank] <= told[rank] + 1 for rank in running)

    def stuck(self, now_s: float) -> str | None:
        """Which ranks are stuck, as a clause; None when all is well."""
        if not any(self._is_late(rank, now_s) for rank in self._marked_s):
            return None
        step = min(self._steps[rank] for rank in self._marked_s)
        behind = [rank for rank in sorted(self._marked_s) if self._steps[rank] == step]
        who = f"rank {behind[0]} has" if len(behind) == 1 else f"ranks {', '.join(map(str, behind))} have"
        age_s = max(now_s - self._marked_s[rank] for rank in behind)
        limit = f"the longest step so far took {self._longest_s:.1f} s"
        if self._longest_s == 0.0:
            limit = f"{self._first_step_timeout_s:g} s are allowed for the first step"
        return f"{who} been in step {step + 1} for {age_s:.1f} s, when {limit}"

    def _is_late(self, rank: int, now_s: float) -> bool:
        age_s = now_s - self._marked_s[rank]
        if self._steps[rank] > 0:
            return age_s > self._longest_s + self._step_slack_s
        return self._first_step_timeout_s is not None and age_s > self._first_step_timeout_s
