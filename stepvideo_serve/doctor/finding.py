"""What a look found: a level, a sentence, and what to do about it."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """ok; a warning: the server starts, and something is slower or smaller than it might be; a fault: the server does
    not start, or fails its requests; not looked at: what there is to see is elsewhere, on a machine with GPUs say."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"
    UNSEEN = "not looked at"


@dataclass(frozen=True)
class Finding:
    """`found`: a sentence; `remedy`: what to do, with every warning and fault."""

    level: Level
    found: str
    remedy: str = ""


Findings = Iterator[Finding]


def ok(found: str) -> Finding:
    return Finding(Level.OK, found)


def warning(found: str, remedy: str) -> Finding:
    return Finding(Level.WARNING, found, remedy)


def fault(found: str, remedy: str) -> Finding:
    return Finding(Level.FAULT, found, remedy)


def unseen(why: str) -> Finding:
    return Finding(Level.UNSEEN, why)
