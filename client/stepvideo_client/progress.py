"""A progress bar for one generation, without dependencies."""

from typing import TextIO

from stepvideo_client.events import StepEvent

_BAR_CELLS = 24


class Progress:
    """Writes "step k/N", seconds per step and the time left to `stream`.

    On a terminal one line that is rewritten; elsewhere a plain line for the first step and every tenth of the way.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._first: StepEvent | None = None  # the first finished step; the time before it is not sampling
        self._latest: StepEvent | None = None
        self._shown_tenth = -1

    def show(self, event: StepEvent) -> None:
        """Takes one event of the generation."""
        if event.step > 0 and self._first is None:
            self._first = event
        if self._latest is None or event.step > self._latest.step:  # a repeated step says nothing about the pace
            self._latest = event
        line = self._line(event)
        if self._live:
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()
            return
        tenth = 10 * event.step // max(event.total_steps, 1)
        if tenth > self._shown_tenth or event is self._first:
            self._shown_tenth = tenth
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the cursor on a fresh line."""
        if self._live and self._latest is not None:
            print(file=self._stream, flush=True)

    def _line(self, event: StepEvent) -> str:
        parts = [f"step {event.step}/{event.total_steps}"]
        if self._live:
            filled = _BAR_CELLS * min(event.step, event.total_steps) // max(event.total_steps, 1)
            parts.append(f"[{'#' * filled}{'.' * (_BAR_CELLS - filled)}]")
        pace_s = self._seconds_per_step()
        if event.queue_position is not None:
            soon = "" if event.start_in_s is None else f", in about {clock(event.start_in_s)}"
            return "  ".join([*parts, f"waiting at place {event.queue_position}{soon}"])
        if event.step <= 0:
            parts.append("waiting for the first step")
        elif pace_s is not None:
            parts.append(f"{pace_s:.2f} s/step")
        if event.step >= event.total_steps:
            parts.append("decoding the video")
        elif pace_s is not None and event.step > 0:
            parts.append(f"{clock(pace_s * (event.total_steps - event.step))} left")
        return "  ".join(parts)

    def _seconds_per_step(self) -> float | None:
        if self._first is None or self._latest is None or self._latest.step <= self._first.step:
            return None
        return (self._latest.elapsed_s - self._first.elapsed_s) / (self._latest.step - self._first.step)


def clock(seconds: float) -> str:
    """1:05 or 1:02:03."""
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
