"""Trains the tiny checkpoint on the toy world.

    python -m toyworld.train --stage vae --out DIR [--minutes N]
    python -m toyworld.train --stage dit --out DIR [--minutes N]
    python -m toyworld.train --stage write --out DIR --checkpoint toyworld/checkpoint

Stages go on where they were stopped, and take the same course whether stopped or not. `vae` trains encoder and decoder
(DIR/vae.safetensors); `dit` encodes clips (DIR/latents-*.safetensors), then trains on them (DIR/dit.safetensors);
`write` makes the checkpoint in the official layout, and may be run at any time after both have begun. With
`--init CHECKPOINT` a new DIR begins from trained weights: the VAE with `--vae-phases decoder`, which leaves latents as
they are, or with `joint`, after which the DiT must be trained on.
"""

import argparse
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Final

import torch

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.dit.model import StepVideoDiT
from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.vae.model import VideoVAE
from toyworld.training.dit import DitPlan, DitTrainer
from toyworld.training.dit_setup import toy_dit
from toyworld.training.latents import ClipSet, cached_clips, encode_prompts
from toyworld.training.official_layout import write_checkpoint
from toyworld.training.vae import PLAN, Phase, VaeTrainer

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
HELD_OUT_CLIPS: Final = 64
DEFAULT_PHASES: Final = {phase.kind: phase for phase in (*PLAN, Phase("joint", 800, 1, 5e-4, 2e-5))}


def main() -> int:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    try:
        return {"vae": train_vae, "dit": train_dit, "write": write}[options.stage](options)
    except (StepVideoError, OSError) as error:
        print(f"toyworld.train: {error}", file=sys.stderr)
        return 2


def train_vae(options: argparse.Namespace) -> int:
    trainer = _vae_trainer(options)
    if options.init and not trainer.path.exists():
        trainer.begin_from(_vae_of(Checkpoint(options.init)).state_dict())
    return _ended("vae", trainer.run(options.minutes, _say))


def train_dit(options: argparse.Namespace) -> int:
    vae = _vae_trainer(options).finished()
    text_from = Checkpoint(options.text_from)
    sets = []
    for name, count, held_out in (("train", options.clips, False), ("held-out", HELD_OUT_CLIPS, True)):
        path = options.out / f"latents-{name}.safetensors"
        clips = cached_clips(path, vae.encoder, count, held_out, options.minutes, _say)
        if clips is None:
            return _ended("latents", done=False)
        sets.append(clips)
    both = ClipSet(sets[0].scenes + sets[1].scenes, sets[0].latents)
    _say(f"encoding the prompts of {len(both.scenes)} clips")
    texts = encode_prompts(text_from, both)
    dit, plan = _new_dit(text_from, vae), DitPlan(steps=options.dit_steps, batch=options.batch)
    fresh = options.init is None
    if not fresh:
        dit.load_state_dict(Checkpoint(options.init).dit().state_dict())
        plan = replace(plan, rate=plan.rate / 3)
    trainer = DitTrainer(options.out, options.seed, dit, (sets[0], sets[1]), texts, plan, fresh)
    return _ended("dit", trainer.run(options.minutes, _say))


def write(options: argparse.Namespace) -> int:
    """The checkpoint from the running means of the weights."""
    text_from = Checkpoint(options.text_from)
    vae = _vae_trainer(options).finished()
    dit = _new_dit(text_from, vae)
    if not (options.out / "dit.safetensors").exists():
        raise StepVideoError(f"{options.out} must hold dit.safetensors, which is not there: run --stage dit first.")
    DitTrainer.load_mean(options.out / "dit.safetensors", dit)
    write_checkpoint(options.checkpoint, options.text_from, vae.state_dict(), dit.state_dict(), dit.config)
    size = sum(path.stat().st_size for path in options.checkpoint.rglob("*") if path.is_file())
    print(f"{options.checkpoint}: {size / 1e6:.1f} MB")
    return 0


def _vae_trainer(options: argparse.Namespace) -> VaeTrainer:
    names = options.vae_phases.split(",")
    if unknown := [name for name in names if name not in DEFAULT_PHASES]:
        raise StepVideoError(f"--vae-phases must be among {', '.join(DEFAULT_PHASES)}, got {unknown[0]}: correct it.")
    steps = [int(count) for count in options.vae_steps.split(",")] if options.vae_steps else []
    if steps and len(steps) != len(names):
        raise StepVideoError(
            f"--vae-steps must give {len(names)} numbers, one per phase, got {len(steps)}: correct it."
        )
    phases = [DEFAULT_PHASES[name] for name in names]
    plan = tuple(replace(phase, steps=count) for phase, count in zip(phases, steps, strict=True)) if steps else phases
    return VaeTrainer(options.out, options.seed, tuple(plan))


def _vae_of(checkpoint: Checkpoint) -> VideoVAE:
    vae = VideoVAE(checkpoint.vae_config)
    vae.encoder.load_state_dict(checkpoint.vae_encoder().state_dict())
    vae.decoder.load_state_dict(checkpoint.vae_decoder().state_dict())
    return vae


def _new_dit(text_from: Checkpoint, vae: VideoVAE) -> StepVideoDiT:
    return toy_dit(vae.encoder.config.z_channels, text_from.llm_config.width, text_from.clip_config.hidden_size)


def _ended(stage: str, done: bool) -> int:
    _say(f"{stage}: {'the plan is done' if done else 'time is up; run the same command to go on'}")
    return 0


def _say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m toyworld.train", description="Train the toy world's checkpoint.")
    parser.add_argument("--stage", required=True, choices=("vae", "dit", "write"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after that long (default: when done)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--init", type=Path, help="checkpoint to begin from instead of random weights")
    parser.add_argument(
        "--text-from",
        type=Path,
        default=CHECKPOINT,
        help="checkpoint whose text encoders are used; build/tiny (make demo) has some, where there is none yet",
    )
    parser.add_argument("--vae-phases", default=",".join(phase.kind for phase in PLAN), help="default %(default)s")
    parser.add_argument("--vae-steps", help="steps of each phase (default: as planned)")
    parser.add_argument("--clips", type=int, default=1200, help="clips that the DiT trains on (default %(default)s)")
    parser.add_argument("--dit-steps", type=int, default=DitPlan.steps, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=DitPlan.batch, help="clips per step of the DiT")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder that --stage write makes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
