"""Images and prompts of the toy world for `export.calibrate`: NAME.png and NAME.txt, of combinations that were trained.

python -m toyworld.calibration_pairs --out DIR [--count 16]
"""

import argparse
import sys
from pathlib import Path
from typing import Final

import torch

from toyworld.prompts import prompt
from toyworld.samples import first_image, png
from toyworld.world import draw_scene

SEED: Final = 40_000_000


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m toyworld.calibration_pairs", description="Write images and prompts of the toy world."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write them into")
    parser.add_argument("--count", type=int, default=16, help="how many pairs (default %(default)s)")
    options = parser.parse_args()
    return write(options.out, options.count)


def write(out: Path, count: int) -> int:
    """The same pairs each time; returns the exit status."""
    generator = torch.Generator().manual_seed(SEED)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            scene = draw_scene(generator, held_out=False)
            (out / f"toy_{index:03d}.png").write_bytes(png(first_image(scene)))
            (out / f"toy_{index:03d}.txt").write_text(prompt(scene, generator) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"toyworld.calibration_pairs: {out} could not be written: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {count} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
