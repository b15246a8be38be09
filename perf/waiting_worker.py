"""A worker whose steps only wait, and then do what every step does to show that it is alive; run by perf.parallel."""

import time
from typing import Any

from stepvideo_serve.parallel.rank_process import JobContext
from stepvideo_serve.parallel.shared_memory import Array


class SignsOfLife:
    """Marks and reports each of params["steps"] steps of `step_s`; returns the seconds that all this took, and the
    tensors as they came."""

    def info(self) -> dict[str, Any]:
        return {}

    def run(
        self, params: dict[str, Any], tensors: dict[str, Array], context: JobContext
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        seconds = 0.0
        for step in range(params["steps"]):
            time.sleep(params["step_s"])
            began_s = time.perf_counter()
            context.mark_step()
            context.report({"step": step + 1}, tensors)
            seconds += time.perf_counter() - began_s
        return {"seconds": seconds}, tensors


def build_worker(_settings: dict[str, Any]) -> SignsOfLife:
    return SignsOfLife()
