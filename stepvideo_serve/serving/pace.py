"""How fast the ranks are, told from the steps so far, and what that means for a run that is still to come."""

import threading
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from stepvideo_serve.dit.config import FFN_MULTIPLE, DiTConfig
from stepvideo_serve.sampling.guidance import needs_guidance

NEWEST = 0.2  # weight of the newest step in the average

Arrays = Mapping[str, NDArray[Any]]


class Pace:
    """An exponential average of seconds per FLOP, over steps of any size."""

    def __init__(self, config: DiTConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._seconds_per_flop: float | None = None

    def note(self, params: Mapping[str, Any], tensors: Arrays, seconds: float) -> None:
        """A step of such a run took so long."""
        rate = seconds / self.step_flops(params, tensors)
        with self._lock:
            old = self._seconds_per_flop
            self._seconds_per_flop = rate if old is None else old + NEWEST * (rate - old)

    def step_seconds(self, params: Mapping[str, Any], tensors: Arrays) -> float | None:
        """What a step of such a run will take; None before the first step of all."""
        rate = self._seconds_per_flop
        return None if rate is None else rate * self.step_flops(params, tensors)

    def step_flops(self, params: Mapping[str, Any], tensors: Arrays) -> float:
        """Matrix products and attentions of all blocks, of all guidance branches; LATENTS is [F, C, h, w]."""
        config, width = self._config, self._config.width
        frames, _, height, columns = tensors["LATENTS"].shape
        tokens = frames * height * columns // config.patch_size**2
        branches = ("POSITIVE", "NEGATIVE") if needs_guidance(params["cfg_scale"]) else ("POSITIVE",)
        text = sum(
            len(tensors[f"{name}_{kind}"])
            for name in branches
            for kind in ("LLM", "CLIP")
            if f"{name}_{kind}" in tensors
        )
        linears = 2 * tokens * width**2 * (6 + 2 * FFN_MULTIPLE) * len(branches)  # qkv, out, cross q and out
        attention = 4 * tokens * width * (tokens * len(branches) + text)
        return float(config.num_layers * (linears + attention))
