"""What needs no weights: rotary embedding, schedule and image preparation: `rope.*`, `sched.*`, `pre.*`."""

import re

import torch

from export.goldens.answers import GIVEN, UNKNOWN, Answer, Computed, Skipped
from export.goldens.folder import Goldens
from stepvideo_serve.dit.rope import apply_rope, axis_angles, rope_tables
from stepvideo_serve.sampling.denoise import euler_step, flow_times
from stepvideo_serve.video.image import fit_image

PREFIXES = ("rope", "sched", "pre")


class FunctionGoldens:
    """Sizes, steps and shifts stand in the entries' names and descriptions."""

    def __init__(self, goldens: Goldens) -> None:
        self._goldens = goldens

    def recompute(self, name: str) -> Answer:
        if name in ("rope.input", "sched.step.sample", "sched.step.model_output"):
            return GIVEN
        if name == "rope.output":
            return self._rope()
        if found := re.fullmatch(r"rope\.(cos|sin)(\d+)", name):
            angles = axis_angles(torch.arange(self._goldens.shape(name)[0], dtype=torch.float32), int(found[2]))
            return Computed(angles.cos() if found[1] == "cos" else angles.sin())
        if found := re.fullmatch(r"sched\.(\d+)\.([\d.]+)\.(sigmas|timesteps)", name):
            times = flow_times(int(found[1]), float(found[2]))
            return Computed(times if found[3] == "sigmas" else times[:-1])
        if found := re.fullmatch(r"sched\.step\.out(\d+)", name):
            return self._euler_steps(int(found[1]))
        if found := re.fullmatch(r"pre\.(.+)\.(\d+)x(\d+)", name):
            return Computed(fit_image(self._goldens.image(found[1]), int(found[2]), int(found[3]))[None])
        return UNKNOWN

    def _rope(self) -> Answer:
        found = re.search(r"grid f,h,w = (\d+),(\d+),(\d+)", self._goldens.descriptions["rope.input"])
        if not found:
            return Skipped('the description of rope.input does not say "grid f,h,w = ..."')
        cos, sin = rope_tables(*(int(size) for size in found.groups()))
        return Computed(apply_rope(self._goldens.tensor("rope.input"), cos, sin))

    def _euler_steps(self, last: int) -> Answer:
        """Steps 0 to `last` with the same velocity in each."""
        found = re.search(r"of \((\d+), ([\d.]+)\)", self._goldens.descriptions.get("sched.step.out0", ""))
        if not found:
            return Skipped('the description of sched.step.out0 does not say "of (steps, shift)"')
        times = flow_times(int(found[1]), float(found[2]))
        if last >= len(times) - 1:
            return UNKNOWN
        latents = self._goldens.tensor("sched.step.sample")
        for step in range(last + 1):
            latents = euler_step(latents, self._goldens.tensor("sched.step.model_output"), times, step)
        return Computed(latents)
