"""Does the tiny checkpoint do what its prompts say? Measured on decoded pixels of combinations never trained on.

    python -m toyworld.evaluate [--checkpoint DIR] [--prompts 64] [--out DIR]

Each held-out scene is sampled with its prompt, with the opposite direction on the same image, and with an empty
prompt, through the served pipeline in this process. Prints a table, and writes quality.json, contact_sheet.png and
motion_score.png into DIR. Exits with 1 when a figure misses what it must reach.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.stages import LocalStages
from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import StepVideoError
from stepvideo_serve.vae.chunking import decode_chunks
from toyworld import metrics, pictures
from toyworld.prompts import OPPOSITE, wordings
from toyworld.samples import Sampling, bytes_to_pixels, first_image, local_stages, sample, serve_config
from toyworld.training.latents import encode_clip
from toyworld.world import Scene, draw_scene, render

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
SCENE_SEED: Final = 30_000_000
RECONSTRUCTED: Final = 16  # clips whose VAE reconstruction is measured; it varies little
SHEET_ROWS: Final = 8
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """One figure: what it must reach and aims at; None where it is for information."""

    name: str
    unit: str
    must: float | None
    aim: float | None


TARGETS: Final = (
    Target("VAE reconstruction", "dB", 27, 30),
    Target("first frame against the image", "dB", 26, 29),
    Target("direction as prompted", "", 0.95, 0.98),
    Target("opposite prompt, same image", "", 0.95, 0.98),
    Target("Spearman(motion score, speed)", "", 0.85, 0.93),
    Target("colour kept", "", 0.90, 0.97),
    Target("shape kept", "", None, None),
    Target("camera or shape, as prompted", "", None, None),
    Target("empty prompt: direction by chance", "", None, None),
    Target("border seam (1 = none)", "", None, None),
)


@dataclass(frozen=True)
class Measured:
    """Of one sample. `speed` is along the prompted direction, in pixels a frame."""

    motion_score: float
    direction: bool
    speed: float
    colour: bool
    shape: bool
    camera: bool
    first_frame_db: float
    seam: float


def held_out_scene(index: int) -> Scene:
    """Scene `index` of the evaluation: combinations, places and speeds that training never saw together."""
    return draw_scene(torch.Generator().manual_seed(SCENE_SEED + index), held_out=True)


def wording(scene: Scene, index: int) -> str:
    """The prompt of scene `index`: all wordings take turns."""
    texts = wordings(scene)
    return texts[index % len(texts)]


def measure(frames: Tensor, scene: Scene) -> Measured:
    """frames [34, 3, 64, 64] in [-1, 1] of a sample for `scene`."""
    speed = metrics.velocity(metrics.centres(frames, scene.background))
    ground = metrics.velocity(metrics.background_positions(frames, scene.background))
    vx, vy = scene.velocity
    length = (vx * vx + vy * vy) ** 0.5
    along = [(v[0] * vx + v[1] * vy) / length for v in (speed, ground)]
    return Measured(
        motion_score=scene.motion_score,
        direction=speed != (0.0, 0.0) and metrics.direction(speed) == metrics.seen_direction(scene),
        speed=along[0],
        colour=metrics.colour(frames, scene.background) == scene.colour,
        shape=metrics.shape(frames, scene.background) == scene.shape,
        camera=(along[1] > along[0] / 2) == scene.camera,
        first_frame_db=metrics.psnr(frames[:1], bytes_to_pixels(first_image(scene)[None])),
        seam=metrics.seam(frames),
    )


@torch.no_grad()
def reconstruction_db(checkpoint: Checkpoint, count: int) -> float:
    """Mean PSNR of whole true clips through the VAE, borders blended as served."""
    encoder, decoder = checkpoint.vae_encoder(), checkpoint.vae_decoder()
    values = []
    for index in range(count):
        clip = render(held_out_scene(index))
        latents = encode_clip(encoder, held_out_scene(index))
        out = torch.cat(list(decode_chunks(latents, decoder)))
        values.append(metrics.psnr(out.clamp(-1, 1), clip))
    return statistics.mean(values)


class Evaluation:
    """Samples of the held-out scenes and what was measured on them."""

    def __init__(self, stages: LocalStages, config: ServeConfig, sampling: Sampling, say: Say) -> None:
        self._stages, self._config, self._sampling, self._say = stages, config, sampling, say
        self.prompted: list[Measured] = []
        self.opposite: list[Measured] = []
        self.empty: list[Measured] = []
        self.rows: list[tuple[str, Tensor]] = []

    def run(self, count: int) -> None:
        """Three samples of each of the first `count` scenes."""
        began_s = time.monotonic()
        for index in range(count):
            scene = held_out_scene(index)
            turned = replace(scene, direction=OPPOSITE[scene.direction])
            prompts = (wording(scene, index), wording(turned, index), "")
            for text, expected, results in zip(
                prompts, (scene, turned, scene), (self.prompted, self.opposite, self.empty), strict=True
            ):
                frames = self._frames(scene, text, index)
                results.append(measure(frames, expected))
                if len(self.rows) < SHEET_ROWS and text:
                    self.rows.append((text if text.isascii() else f"In Chinese: {wordings(expected)[-1]}", frames))
            right = sum(result.direction for result in self.prompted)
            minutes = (time.monotonic() - began_s) / 60
            self._say(f"{index + 1}/{count} scenes, direction right in {right}, {minutes:.1f} min")

    def figures(self) -> dict[str, float]:
        """By the names of TARGETS, without the VAE's own."""

        def share(name: str, results: list[Measured]) -> float:
            return statistics.mean(float(getattr(result, name)) for result in results)

        both = self.prompted + self.opposite
        return {
            "first frame against the image": share("first_frame_db", self.prompted),
            "direction as prompted": share("direction", self.prompted),
            "opposite prompt, same image": share("direction", self.opposite),
            "Spearman(motion score, speed)": metrics.spearman(
                [result.motion_score for result in both], [result.speed for result in both]
            ),
            "colour kept": share("colour", self.prompted),
            "shape kept": share("shape", self.prompted),
            "camera or shape, as prompted": share("camera", both),
            "empty prompt: direction by chance": share("direction", self.empty),
            "border seam (1 = none)": share("seam", self.prompted),
        }

    def _frames(self, scene: Scene, text: str, seed: int) -> Tensor:
        return bytes_to_pixels(sample(self._stages, self._config, scene, text, seed, self._sampling))


def table(figures: dict[str, float]) -> str:
    """One line per figure: value, must, aim, verdict."""
    lines = [f"{'figure':<36} {'reached':>8} {'must':>6} {'aim':>6}"]
    for target in TARGETS:
        value = figures[target.name]
        bounds = ["-" if bound is None else f"{bound:g}" for bound in (target.must, target.aim)]
        lines.append(f"{target.name:<36} {value:>8.2f} {bounds[0]:>6} {bounds[1]:>6}  {verdict(target, value)}")
    return "\n".join(lines)


def verdict(target: Target, value: float) -> str:
    if target.must is None or target.aim is None:
        return ""
    if value >= target.aim:
        return "aim reached"
    return "ok" if value >= target.must else "MISSED"


def main() -> int:
    options = _parser().parse_args()
    try:
        return run(options)
    except (StepVideoError, OSError) as error:
        print(f"toyworld.evaluate: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    config = serve_config(options.checkpoint, options.precision, options.threads)
    sampling = Sampling(options.steps, options.time_shift, options.cfg_scale)
    evaluation = Evaluation(local_stages(config), config, sampling, say)
    figures = {TARGETS[0].name: reconstruction_db(Checkpoint(options.checkpoint), min(options.prompts, RECONSTRUCTED))}
    evaluation.run(options.prompts)
    figures |= evaluation.figures()
    print(table(figures))
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "scenes": options.prompts,
        "sampling": asdict(sampling),
        "precision": options.precision,
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "prompted": [asdict(result) for result in evaluation.prompted],
        "opposite": [asdict(result) for result in evaluation.opposite],
    }
    (options.out / "quality.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    pictures.contact_sheet(evaluation.rows).save(options.out / "contact_sheet.png")
    both = evaluation.prompted + evaluation.opposite
    plot = pictures.motion_plot([(result.motion_score, result.speed) for result in both])
    plot.save(options.out / "motion_score.png")
    print(f"\n{options.out}: quality.json, contact_sheet.png, motion_score.png")
    return int(any(verdict(target, figures[target.name]) == "MISSED" for target in TARGETS))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m toyworld.evaluate", description="Measure the tiny checkpoint.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="folder of the report")
    parser.add_argument("--prompts", type=int, default=64, help="held-out scenes (default %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all cores")
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--time-shift", type=float, default=Sampling.time_shift)
    parser.add_argument("--cfg-scale", type=float, default=Sampling.cfg_scale)
    return parser


if __name__ == "__main__":
    sys.exit(main())
