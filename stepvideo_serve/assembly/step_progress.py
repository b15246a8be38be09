"""The progress of one generation, on a terminal or in a log."""

from typing import TextIO

from stepvideo_serve.pipeline.generate import Progress


class StepProgress:
    """Writes "step k/N", seconds per step and the time left to `stream`: on a terminal a line that is rewritten,
    elsewhere a line for the first step and for each tenth of the way."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._first: Progress | None = None  # what came before the first step is not sampling
        self._tenth = 0

    def show(self, event: Progress) -> None:
        """Takes one event of the generation."""
        first = self._first is None
        self._first = self._first or event
        if self._live:
            self._stream.write(f"\r\x1b[K{self._line(event)}")
            self._stream.flush()
            return
        tenth = 10 * event.step // event.total_steps
        if first or tenth > self._tenth:
            self._tenth = tenth
            print(self._line(event), file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the cursor on a fresh line."""
        if self._live and self._first is not None:
            print(file=self._stream, flush=True)

    def _line(self, event: Progress) -> str:
        line = f"step {event.step}/{event.total_steps}"
        if event.step == event.total_steps:
            return f"{line}  decoding the video"
        if self._first is None or event.step <= self._first.step:
            return line
        pace_s = (event.elapsed_s - self._first.elapsed_s) / (event.step - self._first.step)
        return f"{line}  {pace_s:.2f} s/step  {clock(pace_s * (event.total_steps - event.step))} left"


def clock(seconds: float) -> str:
    """1:05 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
