"""Trains the toy Video-VAE: single images, then clips, then the whole decoder behind a frozen encoder.

Every step draws its clips and its noise from its own number, so that a run stopped anywhere goes on bit-identically.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from stepvideo_serve.errors import CheckpointError
from stepvideo_serve.geometry import FRAMES_PER_CHUNK
from stepvideo_serve.vae.config import VAEConfig
from stepvideo_serve.vae.model import VideoVAE
from toyworld.training.optimizer import Optimizer, RunningMean
from toyworld.training.state import load_state, part, prefixed, save_state
from toyworld.training.vae_setup import (
    TOY_VAE,
    PixelHead,
    attach_pixels,
    copy_time_phase,
    drop_logvar_gradient,
    initialise,
    round_to_bf16,
    standardise,
)
from toyworld.world import FRAMES, SIZE_PX, cover, draw_scene, render

LATENT_NOISE: Final = 0.03
SHAPE_WEIGHT: Final = 8.0
WARM_UP_STEPS: Final = 20
MEAN_DECAY: Final = 0.99
SAVE_EVERY_S: Final = 120.0
CHECK_CLIPS: Final = 8
STATISTICS_CLIPS: Final = 24
CHECK_SEED: Final = 10**9
PLAIN: Final = ("vae.encoder.conv_in.", "vae.decoder.conv_out.", "head.")  # first and last layers
LAST_LEVEL: Final = ("vae.decoder.up.0.", "vae.decoder.norm_out.", "vae.decoder.conv_out.")


@dataclass(frozen=True)
class Phase:
    """`kind`: "image" (one frame) or "clip" (17) through encoder and pixel head, "joint" (17) through the whole VAE, or
    "decoder" (17) through the whole decoder with the encoder frozen, so that latents stay what they are."""

    kind: str
    steps: int
    batch: int
    rate: float
    last_rate: float
    size: int = SIZE_PX

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine from `rate` to `last_rate`."""
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / WARM_UP_STEPS) * (self.last_rate + (self.rate - self.last_rate) * falling)


WHOLE: Final = ("joint", "decoder")  # kinds that train the decoder's last level too
PLAN: Final = (
    Phase("image", 600, 4, 3e-3, 1e-3),
    Phase("clip", 1500, 2, 1e-3, 5e-5),
    Phase("decoder", 800, 1, 5e-4, 2e-5),
)


class VaeTrainer:
    """The networks, and where the training stands: phase number `phase`, `step` steps of it done."""

    def __init__(self, out: Path, seed: int, plan: tuple[Phase, ...] = PLAN, config: VAEConfig = TOY_VAE) -> None:
        """Goes on from OUT/vae.safetensors where that is there. Raises CheckpointError when it is unreadable."""
        self.path = out / "vae.safetensors"
        self.seed, self.plan = seed, plan
        self.vae, self.head = VideoVAE(config), PixelHead(config)
        self.phase, self.step = 0, 0
        initialise(self.vae, seed)
        self._begin_phase()
        if self.path.exists():
            self._load()

    @property
    def done(self) -> bool:
        return self.phase == len(self.plan)

    def begin_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begins the plan with these weights of a whole VAE instead of random ones."""
        self.vae.load_state_dict(weights)
        self._begin_phase()

    def finished(self) -> VideoVAE:
        """The VAE as it would be served if training ended now: running means, everything attached, encoder in bf16.

        Raises CheckpointError when the encoder may still change: its latents would be worth nothing.
        """
        kinds = [phase.kind for phase in self.plan]
        if not self.done and kinds[self.phase] != "decoder":
            raise CheckpointError(
                f"{self.path} must be past the phases that train the encoder, is in phase {kinds[self.phase]}: "
                "run --stage vae first."
            )
        if not self.done:
            self.use_mean()
        return self.vae.requires_grad_(False).eval()

    def run(self, minutes: float, say: Callable[[str], None], check_every: int = 50) -> bool:
        """Trains for that long or to the end of the plan, saves, and tells whether the end was reached."""
        began_s = saved_s = time.monotonic()
        while not self.done and time.monotonic() - began_s < 60 * minutes:
            phase = self.plan[self.phase]
            loss = self.advance()
            if self.step % 10 == 0:
                used = (time.monotonic() - began_s) / 60
                say(f"vae {phase.kind} step {self.step}/{phase.steps} loss {loss:.4f} {used:.1f} min")
            if self.step % check_every == 0 or self.step == phase.steps:
                say(f"vae {phase.kind} step {self.step}/{phase.steps} held-out PSNR {self.held_out_psnr():.2f} dB")
            self.end_phase_if_due()
            if time.monotonic() - saved_s > SAVE_EVERY_S:
                self.save()
                saved_s = time.monotonic()
        self.save()
        return self.done

    def advance(self) -> float:
        """One step; returns the loss."""
        phase = self.plan[self.phase]
        generator = torch.Generator().manual_seed((self.seed * 1000 + self.phase) * 1_000_003 + self.step)
        pixels, weight = draw_clips(
            generator, phase.batch, 1 if phase.kind == "image" else FRAMES_PER_CHUNK, phase.size
        )
        with torch.set_grad_enabled(phase.kind != "decoder"):
            mean = self.vae.encoder(pixels)[0]
        latents = mean + LATENT_NOISE * torch.randn(mean.shape, generator=generator)
        whole = phase.kind in WHOLE
        error = (self.vae.decoder(latents) if whole else self.head(self.vae.decoder, latents)) - pixels
        loss = (weight * (2 * error.square() + 0.5 * error.abs())).mean() + 1e-3 * mean.square().mean()
        loss.backward()
        drop_logvar_gradient(self.vae.encoder)
        self.step += 1
        self.optimizer.step(phase.rate_at(self.step - 1), self.step)
        self.mean.update(self.optimizer.parameters, self.step)
        return float(loss.detach())

    def use_mean(self) -> None:
        """Puts the running mean in the place of the weights."""
        with torch.no_grad():
            for name, parameter in self.optimizer.parameters.items():
                parameter.copy_(self.mean.state[name])

    @torch.no_grad()
    def held_out_psnr(self) -> float:
        """Of CHECK_CLIPS clips with unseen combinations, in dB, with the running mean of the weights."""
        phase = self.plan[self.phase]
        weights = {name: parameter.detach().clone() for name, parameter in self.optimizer.parameters.items()}
        self.use_mean()
        generator = torch.Generator().manual_seed(CHECK_SEED)
        frames = 1 if phase.kind == "image" else FRAMES_PER_CHUNK
        total = 0.0
        for _ in range(CHECK_CLIPS):
            pixels, _ = draw_clips(generator, 1, frames, phase.size, held_out=True)
            latents = self.vae.encoder(pixels)[0]
            whole = phase.kind in WHOLE
            out = self.vae.decoder(latents) if whole else self.head(self.vae.decoder, latents)
            total += float((out.clamp(-1, 1) - pixels).square().mean())
        for name, parameter in self.optimizer.parameters.items():
            parameter.copy_(weights[name])
        return 10 * math.log10(4 / (total / CHECK_CLIPS))

    def save(self) -> None:
        tensors = {
            **prefixed("vae.", self.vae.state_dict()),
            **prefixed("head.", self.head.state_dict()),
            **prefixed("optimizer.", self.optimizer.state),
            **prefixed("mean.", self.mean.state),
        }
        save_state(self.path, tensors, phase=self.phase, step=self.step, seed=self.seed)

    def _load(self) -> None:
        tensors, header = load_state(self.path)
        self.phase, self.step = int(header["phase"]), int(header["step"])
        self.vae.load_state_dict(part(tensors, "vae."))
        self.head.load_state_dict(part(tensors, "head."))
        self._begin_phase()
        if self.step > 0:  # else the phase begins, with fresh states
            self.optimizer.state = part(tensors, "optimizer.")
            self.mean.state = part(tensors, "mean.")

    def _begin_phase(self) -> None:
        """Fresh optimizer state for the parameters that the phase trains."""
        kind = self.plan[min(self.phase, len(self.plan) - 1)].kind
        named = prefixed("vae.", dict(self.vae.named_parameters()))
        if kind in WHOLE:
            trained = {name: p for name, p in named.items() if kind == "joint" or name.startswith("vae.decoder.")}
        else:
            named |= prefixed("head.", dict(self.head.named_parameters()))
            trained = {name: p for name, p in named.items() if not name.startswith(LAST_LEVEL)}
        for name, parameter in named.items():
            parameter.requires_grad_(name in trained)
        self.optimizer = Optimizer(trained, PLAIN)
        self.mean = RunningMean(trained, MEAN_DECAY)

    def end_phase_if_due(self) -> None:
        """After the last step of a phase: its running means become the weights, and the next phase is prepared."""
        if self.step < self.plan[self.phase].steps:
            return
        self.use_mean()
        ended = self.plan[self.phase].kind
        following = self.plan[self.phase + 1].kind if self.phase + 1 < len(self.plan) else None
        if ended == "image" and following == "clip":
            copy_time_phase(self.vae.decoder)
        if ended not in WHOLE and following != "clip":
            attach_pixels(self.vae.decoder, self.head, self._some_latents()[:4], self.seed)  # decoding takes memory
        if ended != "decoder" and following in ("decoder", None):
            standardise(self.vae, self._some_latents())
            round_to_bf16(self.vae.encoder)
        self.phase, self.step = self.phase + 1, 0
        self._begin_phase()

    @torch.no_grad()
    def _some_latents(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        clips = [
            draw_clips(generator, 1, FRAMES_PER_CHUNK, self.plan[self.phase].size) for _ in range(STATISTICS_CLIPS)
        ]
        return torch.cat([self.vae.encoder(clip)[0] for clip, _ in clips])


def draw_clips(
    generator: torch.Generator, count: int, frames: int, size: int = SIZE_PX, held_out: bool = False
) -> tuple[Tensor, Tensor]:
    """Random clips as the VAE sees them, one frame or one chunk, [count, frames, 3, size, size], and what an error
    weighs in each pixel, [count, frames, 1, size, size]: the shape is small, and all that prompts are about."""
    clips, covers = [], []
    for _ in range(count):
        scene = draw_scene(generator, held_out)
        first = int(torch.randint(FRAMES - frames + 1, (), generator=generator))
        clips.append(render(scene, first, frames, size))
        covers.append(cover(scene, first, frames, size))
    return torch.stack(clips), 1 + (SHAPE_WEIGHT - 1) * torch.stack(covers)
