"""The outputs that a caller asks for by name, against the one that its OUTPUT makes.

Triton leaves out of a response what was not asked for, and says nothing about what was asked for and is not there: a
caller that asks for FRAMES and leaves OUTPUT at mp4 would have an empty result, after all the work.
"""

from collections.abc import Collection, Mapping
from typing import Final

from stepvideo_serve.errors import InvalidRequest
from stepvideo_serve.request.fields import OUTPUT_FRAMES, OUTPUT_LATENTS, OUTPUT_MP4

RESULTS: Final[Mapping[str, str]] = {OUTPUT_MP4: "VIDEO", OUTPUT_FRAMES: "FRAMES", OUTPUT_LATENTS: "LATENTS"}
"""OUTPUT -> the output that holds the result."""


def check_asked(names: Collection[str], output: str) -> None:
    """InvalidRequest where `names` have another result than that of `output`, and not that one. Who asks for no result
    at all has what was asked for: REPORT or SEED, say."""
    others = [name for name in RESULTS.values() if name in names]
    if others and RESULTS[output] not in names:
        meant = next(word for word, name in RESULTS.items() if name == others[0])
        raise InvalidRequest(
            f"The outputs asked for must have {RESULTS[output]}, because OUTPUT is {output}, got {', '.join(others)}: "
            f"ask for {RESULTS[output]}, or send OUTPUT {meant}."
        )
