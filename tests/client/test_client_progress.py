import io

from stepvideo_client import StepEvent
from stepvideo_client.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, events: list[StepEvent]) -> list[str]:
    progress = Progress(stream)
    for event in events:
        progress.show(event)
    progress.close()
    return stream.getvalue().split("\r") if stream.isatty() else stream.getvalue().splitlines()


def test_a_log_gets_the_first_step_and_every_tenth() -> None:
    lines = run(io.StringIO(), [StepEvent(k, 50, 10.0 + 2 * k) for k in range(1, 51)])
    assert [line.split()[1] for line in lines] == ["1/50", *(f"{5 * k}/50" for k in range(1, 11))]
    assert lines[0] == "step 1/50"
    assert lines[1] == "step 5/50  2.00 s/step  1:30 left"
    assert lines[-1] == "step 50/50  2.00 s/step  decoding the video"


def test_a_terminal_gets_one_line_that_is_rewritten() -> None:
    first, *lines = run(Terminal(), [StepEvent(1, 4, 5.0), StepEvent(2, 4, 3605.0), StepEvent(4, 4, 9000.0)])
    assert first == ""
    assert all(line.startswith("\x1b[Kstep ") for line in lines)
    assert "[############............]  3600.00 s/step  2:00:00 left" in lines[1]
    assert lines[-1].endswith("decoding the video\n")


def test_repeated_steps_do_not_change_the_pace() -> None:
    lines = run(Terminal(), [StepEvent(0, 4, 0.1), StepEvent(1, 4, 1.0), StepEvent(2, 4, 2.0), StepEvent(2, 4, 60.0)])
    assert "step 0/4" in lines[1]
    assert "waiting for the first step" in lines[1]
    assert "1.00 s/step  0:02 left" in lines[-1]


def test_one_step_only() -> None:
    assert run(io.StringIO(), [StepEvent(1, 1, 0.2)]) == ["step 1/1  decoding the video"]
