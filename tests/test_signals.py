"""What is started to be interrupted can be, also where SIGINT is ignored."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.signals import interrupt, start
from tests.test_architecture import ROOT, sources

SCRIPT = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, flush=True); input()"


@pytest.fixture
def _background() -> Iterator[None]:
    """This process as in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_background")
def test_a_child_heeds_ctrl_c_in_the_background() -> None:
    command = [sys.executable, "-c", SCRIPT]
    with start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "False\n"
        interrupt(child)
        assert "KeyboardInterrupt" in child.communicate(timeout=30)[1]
    ignored = subprocess.run(command, input="\n", capture_output=True, text=True, check=True).stdout
    assert ignored == "True\n", "otherwise this test shows nothing"


def test_only_the_helper_sends_sigint() -> None:
    for path in sources("tests"):
        name = str(path.relative_to(ROOT))
        if name not in ("tests/signals.py", "tests/test_signals.py"):
            assert "signal.SIGINT" not in path.read_text(encoding="utf-8"), f"{name}: use tests.signals"
