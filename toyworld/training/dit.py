"""Trains the toy DiT on cached latents by flow matching (arXiv 2210.02747), with prompts left out now and then.

Time t runs from 0 (noise) to 1 (video), as in the sampler: x = (1 - t) noise + t video, velocity = video - noise.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.request import DEFAULT_NEGATIVE_PROMPT
from stepvideo_serve.text.states import TextStates
from toyworld.prompts import prompt
from toyworld.training.dit_setup import initialise, stack_texts, velocity
from toyworld.training.latents import ClipSet
from toyworld.training.optimizer import Optimizer, RunningMean
from toyworld.training.state import load_state, part, prefixed, save_state
from toyworld.training.vae_setup import LOGVAR

TIME_SHIFT: Final = 3.0
PROMPT_DROPOUT: Final = 0.1
WARM_UP_STEPS: Final = 30
MEAN_DECAY: Final = 0.99
SAVE_EVERY_S: Final = 120.0
CHECK_SEED: Final = 10**9
PLAIN: Final = ("pos_embed", "adaln_single", "proj_out", "scale_shift_table", "transformer_blocks.0.scale_shift_table")


@dataclass(frozen=True)
class DitPlan:
    """Steps of `batch` clips; the learning rate rises over WARM_UP_STEPS and falls as a cosine to a fiftieth."""

    steps: int = 3000
    batch: int = 16
    rate: float = 2e-3
    weight_decay: float = 0.01

    def rate_at(self, step: int) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / WARM_UP_STEPS) * (0.02 + 0.98 * falling)


class DitTrainer:
    """The network, its data, and `step` steps done."""

    def __init__(
        self,
        out: Path,
        seed: int,
        dit: StepVideoDiT,
        clips: tuple[ClipSet, ClipSet],
        texts: Mapping[str, TextStates],
        plan: DitPlan,
        fresh: bool = True,
    ) -> None:
        """`clips`: for training, and held out. `fresh`: initialise `dit`, else go on from its weights. Goes on from
        OUT/dit.safetensors where that is there. Raises CheckpointError when it is unreadable."""
        self.path = out / "dit.safetensors"
        self.seed, self.plan, self.dit, self.texts = seed, plan, dit, texts
        self.clips, self.held_out = clips
        self.step = 0
        if fresh:
            initialise(dit, seed)
        parameters = dict(dit.requires_grad_(True).named_parameters())
        tables = tuple(name for name in parameters if name.endswith("scale_shift_table"))
        self.optimizer = Optimizer(parameters, PLAIN + tables, plan.weight_decay)
        self.mean = RunningMean(parameters, MEAN_DECAY)
        if self.path.exists():
            self._load()

    @staticmethod
    def load_mean(path: Path, dit: StepVideoDiT) -> None:
        """Gives `dit` the running mean of the weights in a training state. Raises CheckpointError."""
        dit.load_state_dict(part(load_state(path)[0], "mean."))

    @property
    def done(self) -> bool:
        return self.step >= self.plan.steps

    def run(self, minutes: float, say: Callable[[str], None], check_every: int = 50) -> bool:
        """Trains for that long or to the end of the plan, saves, and tells whether the end was reached."""
        began_s = saved_s = time.monotonic()
        while not self.done and time.monotonic() - began_s < 60 * minutes:
            loss = self.advance()
            if self.step % 10 == 0:
                used = (time.monotonic() - began_s) / 60
                say(f"dit step {self.step}/{self.plan.steps} loss {loss:.4f} {used:.1f} min")
            if self.step % check_every == 0 or self.done:
                say(f"dit step {self.step}/{self.plan.steps} held-out loss {self.held_out_loss():.4f}")
            if time.monotonic() - saved_s > SAVE_EVERY_S:
                self.save()
                saved_s = time.monotonic()
        self.save()
        return self.done

    def advance(self) -> float:
        """One step; returns the loss."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + self.step)
        loss = self._loss(self.clips, self.plan.batch, generator)
        loss.backward()
        self.step += 1
        self.optimizer.step(self.plan.rate_at(self.step - 1), self.step)
        self.mean.update(self.optimizer.parameters, self.step)
        return float(loss.detach())

    def use_mean(self) -> None:
        """Puts the running mean in the place of the weights."""
        with torch.no_grad():
            for name, parameter in self.optimizer.parameters.items():
                parameter.copy_(self.mean.state[name])

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The loss on unseen combinations, always with the same noise and times, with the running mean."""
        weights = {name: parameter.detach().clone() for name, parameter in self.optimizer.parameters.items()}
        self.use_mean()
        loss = self._loss(self.held_out, 64, torch.Generator().manual_seed(CHECK_SEED))
        for name, parameter in self.optimizer.parameters.items():
            parameter.copy_(weights[name])
        return float(loss)

    def _loss(self, clips: ClipSet, batch: int, generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(clips.scenes), (batch,), generator=generator)
        latents = clips.latents[picks]
        latents = latents + math.exp(LOGVAR / 2) * torch.randn(latents.shape, generator=generator)
        scenes = [clips.scenes[int(i)] for i in picks]
        texts = stack_texts([self.texts[self._prompt_or_none(prompt(scene, generator), generator)] for scene in scenes])
        scores = torch.tensor([scene.motion_score for scene in scenes])
        sigma = torch.rand(batch, generator=generator)
        sigma = TIME_SHIFT * sigma / (1 + (TIME_SHIFT - 1) * sigma)
        noise = torch.randn(latents.shape, generator=generator)
        at = (1 - sigma)[:, None, None, None, None]
        mixed = at * latents + (1 - at) * noise
        out = velocity(self.dit, mixed, latents[:, 0], 1 - sigma, scores, texts)
        return (out - (latents - noise)).square().mean()

    def _prompt_or_none(self, text: str, generator: torch.Generator) -> str:
        """Now and then the empty prompt or the negative one instead: what guidance subtracts."""
        chance = float(torch.rand((), generator=generator))
        if chance < PROMPT_DROPOUT / 2:
            return ""
        return DEFAULT_NEGATIVE_PROMPT if chance < PROMPT_DROPOUT else text

    def save(self) -> None:
        tensors = {
            **prefixed("dit.", self.dit.state_dict()),
            **prefixed("optimizer.", self.optimizer.state),
            **prefixed("mean.", self.mean.state),
        }
        save_state(self.path, tensors, step=self.step, seed=self.seed)

    def _load(self) -> None:
        tensors, header = load_state(self.path)
        self.step = int(header["step"])
        self.dit.load_state_dict(part(tensors, "dit."))
        self.optimizer.state = part(tensors, "optimizer.")
        self.mean.state = part(tensors, "mean.")
