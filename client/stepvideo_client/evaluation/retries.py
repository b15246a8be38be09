"""What a failed attempt means: by the class of its error, whether to ask again, when, and whom."""

import enum
import random

from stepvideo_client.errors import (
    ClientError,
    ConnectionFailed,
    InvalidInput,
    InvalidRequest,
    QueueFull,
    ServiceUnavailable,
    StreamStalled,
)


class Verdict(enum.Enum):
    """NEVER: the same request fails everywhere. BUSY: the server has no place now. AWAY: the server is not there.
    AGAIN: this attempt failed; another may not."""

    NEVER = enum.auto()
    BUSY = enum.auto()
    AWAY = enum.auto()
    AGAIN = enum.auto()


def verdict(error: ClientError) -> Verdict:
    """What the error says about the next attempt."""
    if isinstance(error, InvalidInput | InvalidRequest):
        return Verdict.NEVER
    if isinstance(error, QueueFull):
        return Verdict.BUSY
    return Verdict.AWAY if isinstance(error, ConnectionFailed | ServiceUnavailable) else Verdict.AGAIN


def counts(error: ClientError, begun: bool) -> bool:
    """Whether it was perhaps the clip that failed, not the server that was absent: a clip that ends its server each
    time must not be asked for forever."""
    found = verdict(error)
    return found is Verdict.AGAIN or (found is Verdict.AWAY and (begun or isinstance(error, StreamStalled)))


def back_off_s(failures: int, longest_s: float) -> float:
    """Seconds to wait after so many failures in a row: 1, 2, 4, ... up to `longest_s`, each up to a quarter shorter, so
    that many who fail together do not come again together."""
    return min(2.0 ** min(failures - 1, 30), longest_s) * random.uniform(0.75, 1.0)
