"""How fast the ranks are, told from the steps so far, and what that means for a run that is still to come."""

import threading
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from stepvideo_serve.dit.config import FFN_MULTIPLE, DiTConfig

NEWEST = 0.2  # weight of the newest step in the average

Arrays = Mapping[str, NDArray[Any]]


class Pace:
    """An exponential average of seconds per FLOP, over steps of any size."""

    def __init__(self, config: DiTConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._seconds_per_flop: float | None = None

    def note(self, tensors: Arrays, seconds: float) -> None:
        """A step of a run with these inputs took so long."""
        rate = seconds / self.step_flops(tensors)
        with self._lock:
            old = self._seconds_per_flop
            self._seconds_per_flop = rate if old is None else old + NEWEST * (rate - old)

    def step_seconds(self, tensors: Arrays) -> float | None:
        """What a step of a run with these inputs will take; None before the first step of all."""
        rate = self._seconds_per_flop
        return None if rate is None else rate * self.step_flops(tensors)

    def step_flops(self, tensors: Arrays) -> float:
        """Matrix products and attentions of all blocks, of all guidance branches; LATENTS is [F, C, h, w]."""
        config, width = self._config, self._config.width
        frames, _, height, columns = tensors["LATENTS"].shape
        tokens = frames * height * columns // config.patch_size**2
        branches = [name for name in ("POSITIVE", "NEGATIVE") if f"{name}_LLM" in tensors]
        text = sum(len(tensors[f"{name}_{kind}"]) for name in branches for kind in ("LLM", "CLIP"))
        linears = 2 * tokens * width**2 * (6 + 2 * FFN_MULTIPLE) * len(branches)  # qkv, out, cross q and out
        attention = 4 * tokens * width * (tokens * len(branches) + text)
        return float(config.num_layers * (linears + attention))
