"""What the clips of a plan take, as the servers tell from what they have measured."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stepvideo_client.errors import ServiceUnavailable
from stepvideo_client.evaluation.endpoint import Endpoint
from stepvideo_client.evaluation.plan import PlannedClip, Settings, Size
from stepvideo_client.fields import QuoteOptions

Kinds = Mapping[tuple[Size, str], int]


@dataclass(frozen=True)
class Estimate:
    """Of all clips on one server, one after another: seconds, and seconds of all its GPUs together."""

    seconds: float
    gpu_seconds: float


def kinds_of(clips: Iterable[PlannedClip]) -> Kinds:
    """How many clips there are of each size and preset: what a quote depends on."""
    return Counter((clip.size, clip.preset) for clip in clips)


def estimate(endpoint: Endpoint, kinds: Kinds, settings: Settings) -> Estimate:
    """Asks for quotes per kind (twice with latents); the servers behind a gateway share the clips, those that can tell
    for every kind. Raises InvalidRequest for what a server would refuse, and other ClientError, ServiceUnavailable
    while none has measured everything."""
    found: dict[str, list[Estimate]] = {}
    asked = 0
    for (size, preset), count in kinds.items():
        for output in ("mp4", "latents") if settings.latents else ("mp4",):
            asked += 1
            for server, cost in endpoint.costs(_options(size, preset, settings, output)).items():
                found.setdefault(server, []).append(Estimate(count * cost.seconds, count * cost.gpu_seconds))
    sums = [
        Estimate(sum(one.seconds for one in parts), sum(one.gpu_seconds for one in parts))
        for parts in found.values()
        if len(parts) == asked
    ]
    if not sums:
        raise ServiceUnavailable("No server there has measured all sizes and presets of the set: run one clip of each.")
    return together(sums) if len(sums) > 1 else sums[0]


def together(estimates: Sequence[Estimate]) -> Estimate:
    """Of servers that share the clips: each makes as many as its pace allows."""
    pace = sum(1 / one.seconds for one in estimates)
    return Estimate(1 / pace, sum(one.gpu_seconds / one.seconds for one in estimates) / pace)


def _options(size: Size, preset: str, settings: Settings, output: str) -> QuoteOptions:
    return QuoteOptions(
        num_frames=settings.num_frames,
        height=size[0],
        width=size[1],
        steps=settings.steps,
        cfg_scale=settings.cfg_scale,
        time_shift=settings.time_shift,
        quality=preset,
        output=output,
    )
