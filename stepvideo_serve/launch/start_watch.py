"""Looks at the models' processes while Triton loads them, and finds those for which Triton would wait for ever.

Triton waits without a limit for the first word of a process that it has started, also of one that has died. And it
gives a process up that had no processor for a second, but then waits for the end of that process, which lives on and
waits for Triton (releases before 25.08; later ones wait 10 s for the first word, and give up after 5 s).
"""

import platform
import time
from pathlib import Path

from stepvideo_serve.launch.stub_processes import DEAD, children_of, model_of

LOOK_S = 1.0
PATIENCE_S = 10.0  # a process that ends after an error of its own is waited for as well
WAIT4 = {"x86_64": "61", "aarch64": "260"}  # the system call's number
DIED = "its process has died without a word, and Triton waits for one: look into the log, and start again"
GIVEN_UP = (
    "has given its process up, which had no processor for a second or longer, and now waits for its end: start again, "
    "with less load on this machine"
)


class StartWatch:
    """Of one server that is loading its models."""

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        self._models: dict[int, str] = {}
        self._since_s: dict[tuple[int, str], float] = {}
        self._looked_s = 0.0

    def trouble(self) -> str | None:
        """Why the start cannot end any more, in a sentence; None where it may. To be asked often."""
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_S:
            return None
        self._looked_s = now_s
        self._since_s = {found: self._since_s.get(found, now_s) for found in self._found()}
        for (pid, what), since_s in self._since_s.items():
            if now_s - since_s > PATIENCE_S:
                return f"Triton must load {self._models.get(pid, 'a model')}, but {what}."
        return None

    def _found(self) -> list[tuple[int, str]]:
        """Processes, and what is wrong with them if that lasts."""
        waited_for = _waited_for(self._server_pid)
        found = []
        for pid, state in children_of(self._server_pid):
            model = model_of(pid, self._models)
            if state == DEAD:
                found.append((pid, DIED))
            elif model is not None and pid in waited_for:
                found.append((pid, GIVEN_UP))
        return found


def _waited_for(pid: int) -> set[int]:
    """The processes whose end a thread of this one waits for. Empty where the kernel does not tell."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/syscall"):
        try:
            call = path.read_text(encoding="ascii").split()
        except OSError:  # the thread has ended, or the kernel does not tell
            continue
        if len(call) > 1 and call[0] == WAIT4.get(platform.machine()):
            found.add(int(call[1], 16))
    return found
