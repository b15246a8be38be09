"""What a batch says while it runs: clips made, clips per hour, the time left, and what went wrong."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from stepvideo_client.errors import ClientError
from stepvideo_client.evaluation.lane import Lane
from stepvideo_client.evaluation.plan import PlannedClip
from stepvideo_client.evaluation.results import Clip
from stepvideo_client.progress import clock

_REFRESH_S = 1.0


@dataclass
class BatchProgress:
    """total: clips to have in the end; done: those that are there already. On a terminal the last line is rewritten;
    elsewhere a line for each clip. quiet: errors only."""

    stream: TextIO
    total: int
    done: int
    quiet: bool = False
    made_now: int = 0
    given_up: int = 0
    _started_s: float = field(default_factory=time.monotonic)
    _shown_s: float = 0.0
    _finishing: bool = False
    _line_is_open: bool = False

    def made(self, clip: Clip) -> None:
        """A clip is in the folder."""
        self.made_now += 1
        evaluations = "" if clip.evaluations_mask is None else f", {sum(clip.evaluations_mask)} evaluations"
        self._say(f"{clip.video}: {clip.seconds:.1f} s{evaluations}, {clip.server}")
        if not self._live:
            self._say(self._summary())

    def failed_attempt(self, clip: PlannedClip, lane: Lane, error: ClientError, pause_s: float) -> None:
        """An attempt failed, and there will be another."""
        self._say(f"{clip.name}: {lane.url} rests {pause_s:.0f} s after {error.code}: {error}")

    def gave_up(self, clip: PlannedClip, error: ClientError) -> None:
        """A clip is not tried again; said even when quiet."""
        self.given_up += 1
        self._print(f"stepvideo: {clip.name} cannot be made: {error.code}: {error}")

    def finishing(self, running: int) -> None:
        """After the first Ctrl-C, once; said even when quiet."""
        if not self._finishing:
            self._finishing = True
            self._print(f"stepvideo: {running} clips under way are finished; Ctrl-C again cancels them.")

    def tick(self, lanes: Sequence[Lane]) -> None:
        """The line that is rewritten."""
        now_s = time.monotonic()
        if self._live and not self.quiet and now_s - self._shown_s >= _REFRESH_S:
            self._shown_s = now_s
            waiting = sum(lane.waiting_now for lane in lanes)
            running = sum(len(lane.flights) for lane in lanes) - waiting
            self.stream.write(f"\r\x1b[K{self._summary()}  {running} running, {waiting} waiting")
            self.stream.flush()
            self._line_is_open = True

    def close(self) -> None:
        """Leaves the cursor on a fresh line."""
        if self._line_is_open:
            print(file=self.stream, flush=True)
            self._line_is_open = False

    @property
    def _live(self) -> bool:
        return self.stream.isatty()

    def _summary(self) -> str:
        parts = [f"{self.done + self.made_now}/{self.total} clips"]
        if self.made_now:
            pace_s = (time.monotonic() - self._started_s) / self.made_now
            left = self.total - self.done - self.made_now - self.given_up
            parts += [f"{3600 / pace_s:.1f} an hour", f"{clock(pace_s * left)} left"]
        return "  ".join(parts)

    def _say(self, line: str) -> None:
        if not self.quiet:
            self._print(line)

    def _print(self, line: str) -> None:
        if self._line_is_open:
            self.stream.write("\r\x1b[K")
            self._line_is_open = False
        print(line, file=self.stream, flush=True)
