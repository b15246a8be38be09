"""What the clips of a plan take, as the servers tell from what they have measured."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stepvideo_client.client import Client
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


def estimate(client: Client, kinds: Kinds, settings: Settings) -> Estimate:
    """Asks for a quote per kind (two with latents). Raises InvalidRequest for what the server would refuse, and other
    ClientError, ServiceUnavailable while the server has not measured everything."""
    seconds = gpu_seconds = 0.0
    for (size, preset), count in kinds.items():
        for output in ("mp4", "latents") if settings.latents else ("mp4",):
            quote = client.quote(**_options(size, preset, settings, output))
            seconds += count * quote.seconds
            gpu_seconds += count * quote.gpu_seconds
    return Estimate(seconds, gpu_seconds)


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
