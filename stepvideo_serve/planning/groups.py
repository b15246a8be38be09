"""The GPUs of a node as one group for short answers, or as several for throughput, and what a video costs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stepvideo_serve.memory.sizes import ModelSize, Workload
from stepvideo_serve.parallel.layout import Layout
from stepvideo_serve.planning.cost import Prediction, predict
from stepvideo_serve.planning.gpus import GPU

HOUR_S = 3600.0


@dataclass(frozen=True)
class Group:
    """`count` servers on a node, each with `gpus` GPUs and one video at a time. gpu_s: seconds of GPUs that a video
    takes, of all GPUs of its group together."""

    count: int
    gpus: int
    layout: Layout
    step_llm: str
    request_s: float

    @property
    def gpu_s(self) -> float:
        return self.gpus * self.request_s

    @property
    def videos_per_hour(self) -> float:
        """Of all groups together, while each has a video to make."""
        return self.count * HOUR_S / self.request_s

    def cost(self, gpu_hour: float) -> float:
        """Of a video, in the money of `gpu_hour`, the price of a GPU for an hour."""
        return self.gpu_s / HOUR_S * gpu_hour

    def to_json(self, gpu_hour: float | None) -> dict[str, Any]:
        priced = {} if gpu_hour is None else {"cost": self.cost(gpu_hour)}
        return {
            "groups": self.count,
            "gpus": self.gpus,
            "layout": str(self.layout),
            "step_llm": self.step_llm,
            "request_s": self.request_s,
            "videos_per_hour": self.videos_per_hour,
            "gpu_s": self.gpu_s,
            **priced,
        }


def predictions_of(
    layouts: Iterable[Layout], size: ModelSize, work: Workload, gpu: GPU, precision: str
) -> list[Prediction]:
    """The fastest first."""
    found = [predict(size, layout, work, gpu, precision) for layout in layouts]
    return sorted(found, key=lambda prediction: prediction.request_s)
