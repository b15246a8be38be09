"""Held-out scenes of the toy world as an evaluation set for `stepvideo batch`: a CSV with first images and prompts.

python -m toyworld.scene_set --out build/scenes [--scenes 16]
"""

import argparse
import csv
import sys
from pathlib import Path

from toyworld.evaluate import held_out_scene, wording
from toyworld.samples import first_image, png

COLUMNS = ("id", "image", "prompt", "motion_score")


def write_scenes(folder: Path, count: int) -> Path:
    """Writes scenes 0 .. count - 1, which `make prices` measures, with their own motion scores. Returns the CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scenes.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for index in range(count):
            scene, image = held_out_scene(index), f"scene{index}.png"
            (folder / image).write_bytes(png(first_image(scene)))
            rows.writerow((f"scene{index}", image, wording(scene, index), repr(scene.motion_score)))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m toyworld.scene_set", description="Scenes as an evaluation set.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--scenes", type=int, default=16, metavar="N", help="how many, from scene 0 on (%(default)s)")
    options = parser.parse_args()
    if options.scenes < 1:
        parser.error(f"--scenes must be at least 1, got {options.scenes}")
    try:
        print(write_scenes(options.out, options.scenes))
    except OSError as error:
        print(f"toyworld.scene_set: {options.out} could not be written: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
