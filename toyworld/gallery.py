"""The README's animation: four prompts from one image, and one prompt at four motion scores.

python -m toyworld.gallery --out docs/toyworld.gif [--checkpoint DIR]
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from stepvideo_serve.errors import StepVideoError
from toyworld.first_image import centred_scene
from toyworld.pictures import animation
from toyworld.prompts import wordings
from toyworld.samples import Sampling, bytes_to_pixels, local_stages, sample, serve_config
from toyworld.world import DIRECTIONS, MOTION_SCORES

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
SEED: Final = 7
ENGLISH: Final = 2  # which wording: the first in English


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m toyworld.gallery", description="Animate samples side by side.")
    parser.add_argument("--out", type=Path, required=True, help="GIF file to write")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all cores")
    options = parser.parse_args()
    try:
        config = serve_config(options.checkpoint, threads=options.threads)
        stages = local_stages(config)
        scene = centred_scene("circle", "red", 0)
        turned = [replace(scene, direction=direction, motion_score=10.0) for direction in DIRECTIONS]
        paced = [replace(scene, motion_score=score) for score in MOTION_SCORES]
        rows = []
        for scenes, labels in ((turned, list(DIRECTIONS)), (paced, [f"motion {score:g}" for score in MOTION_SCORES])):
            clips = []
            for one, label in zip(scenes, labels, strict=True):
                print(wordings(one)[ENGLISH], f"motion score {one.motion_score:g}", file=sys.stderr, flush=True)
                frames = sample(stages, config, one, wordings(one)[ENGLISH], SEED, Sampling())
                clips.append((label, bytes_to_pixels(frames)))
            rows.append(clips)
        animation(options.out, rows)
    except (StepVideoError, OSError) as error:
        print(f"toyworld.gallery: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
