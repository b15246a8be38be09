"""W3C trace contexts (https://www.w3.org/TR/trace-context): a request's own, or a new one. Servers go on with it."""

import random
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Final

FORM: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SAMPLED, UNSAMPLED = "01", "00"


def traceparent_of(headers: Sequence[str], sample_ratio: float, chance: Callable[[], float] = random.random) -> str:
    """The traceparent that a job has: the one in `headers`, the values of the request's header, in the form of version
    00. Without one that is valid a new one, which asks for spans in the share `sample_ratio` of all cases."""
    found = FORM.fullmatch(headers[0]) if len(headers) == 1 else None
    if found is not None and (found[4] is None or not headers[0].startswith("00-")):
        return f"00-{found[1]}-{found[2]}-{found[3]}"
    flags = SAMPLED if chance() < sample_ratio else UNSAMPLED
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{flags}"


def trace_id_of(traceparent: str | None) -> str:
    """32 hexadecimal digits; "" without a trace."""
    return traceparent.split("-")[1] if traceparent else ""
