"""A rank that sleeps with each step, as if a GPU worked: processors are then no limit for what is around the steps."""

import os
import time
from collections.abc import Mapping
from typing import Any

from stepvideo_serve.assembly.denoiser_rank import DenoiserRank
from stepvideo_serve.parallel.rank_process import JobContext
from stepvideo_serve.parallel.shared_memory import Array
from stepvideo_serve.serving import rank_factory

STEP_VARIABLE = "STEPVIDEO_BENCH_STEP_S"  # in the environment of the server: seconds of a step


class SleepingContext:
    """A job's surroundings, in which a step's report comes late."""

    def __init__(self, context: JobContext, step_s: float) -> None:
        self._context, self._step_s = context, step_s

    def report(self, params: Mapping[str, object], tensors: Mapping[str, Array]) -> None:
        """Sleeps, then reports."""
        time.sleep(self._step_s)
        self._context.report(params, tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class SleepingRank:
    """A rank whose steps take `step_s` longer."""

    def __init__(self, rank: DenoiserRank, step_s: float) -> None:
        self._rank, self._step_s = rank, step_s

    def info(self) -> dict[str, Any]:
        """The rank's."""
        return self._rank.info()

    def run(
        self, params: dict[str, Any], tensors: dict[str, Array], context: JobContext
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """The rank's, but for the sleep."""
        slow: Any = SleepingContext(context, self._step_s)
        return self._rank.run(params, tensors, slow)


def build_rank(settings: dict[str, Any]) -> SleepingRank:
    """The factory for RankGroup."""
    return SleepingRank(rank_factory.build_rank(settings), float(os.environ[STEP_VARIABLE]))
