"""What a request takes under each preset of a configuration, on a layout that was predicted.

Evaluations are those that the preset decides beforehand, or the mean of the configuration's price files for this size
and number of steps; nothing else tells them without running the model. Forecasts are counted as nothing: they are a few
sums over the latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.memory.sizes import ModelSize, Workload
from stepvideo_serve.planning.cost import Prediction, step_seconds
from stepvideo_serve.planning.evaluations import known_evaluations
from stepvideo_serve.planning.gpus import GPU
from stepvideo_serve.planning.prices import PriceBook


@dataclass(frozen=True)
class Evaluations:
    """Of a run: how many, and the part of them with both branches of guidance, 0 to 1."""

    count: float
    guided_share: float


def evaluations_by_preset(config: ServeConfig, video: VideoGeometry, steps: int) -> dict[str, Evaluations | None]:
    """By the preset's name; None where nobody has measured it. Raises ConfigError for a bad price file."""
    book = PriceBook.load(config.pricing.files)
    found: dict[str, Evaluations | None] = {}
    for name, preset in config.presets.items():
        known = known_evaluations(preset, steps)
        if known is not None and preset.guides_always:
            found[name] = Evaluations(known, 1.0) if preset.mask is None or len(preset.mask) == steps else None
            continue
        price = book.measured(preset, video.num_frames, video.height, video.width, steps)
        measures = None if price is None else price.measures
        found[name] = None if measures is None else Evaluations(measures.evaluations.mean, measures.guided_share)
    return found


def seconds_by_preset(
    prediction: Prediction,
    size: ModelSize,
    work: Workload,
    gpu: GPU,
    precision: str,
    evaluations: Mapping[str, Evaluations | None],
) -> dict[str, float | None]:
    """Seconds of a whole request by preset. With cfg2 a step without guidance takes as long as one with: the branch's
    ranks would idle, so they go on."""
    alone_s = prediction.step.total
    if prediction.layout.cfg == 1:
        alone_s = step_seconds(size, prediction.layout, replace(work, branches=1), gpu, precision).total
    rest_s = prediction.request_s - work.steps * prediction.step.total

    def request_s(its: Evaluations) -> float:
        step_s = its.guided_share * prediction.step.total + (1 - its.guided_share) * alone_s
        return rest_s + its.count * step_s

    return {name: None if its is None else request_s(its) for name, its in evaluations.items()}
