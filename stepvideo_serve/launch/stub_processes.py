"""The processes in which Triton runs the models, as the kernel tells of them in /proc."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stepvideo_serve.launch.install import STUB

DEAD, STOPPED = "Z", "T"  # states in /proc/PID/stat


@dataclass(frozen=True)
class Stub:
    """A process that runs one instance of a model."""

    pid: int
    model: str
    state: str


def stubs_of(server_pid: int, models: dict[int, str]) -> Iterator[Stub]:
    """The model processes below the server; `models` remembers which process is whose."""
    for pid, state in children_of(server_pid):
        if (model := model_of(pid, models)) is not None:
            yield Stub(pid, model, state)


def children_of(parent_pid: int) -> Iterator[tuple[int, str]]:
    """Number and state of each child of a process."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            state, parent = state_of(int(folder.name))
            if parent == parent_pid:
                yield int(folder.name), state


def model_of(pid: int, models: dict[int, str]) -> str | None:
    """The model that a child of the server runs; None for one that runs none, or has died before it was in `models`,
    which remembers."""
    if pid not in models:
        with contextlib.suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if arguments[0].endswith(STUB.encode()) and len(arguments) > 2:  # Triton first tries whether it can be run
                models[pid] = Path(os.fsdecode(arguments[1])).parts[-3]  # .../MODEL/VERSION/model.py
    return models.get(pid)


def state_of(pid: int) -> tuple[str, int]:
    """State and parent of a process; ("", 0) when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[1])
    except OSError:
        return "", 0
