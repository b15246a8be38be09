"""A first image for the tiny checkpoint: one shape in the middle of a background.

python -m toyworld.first_image --out first.png [--shape circle] [--colour red] [--background 0]
"""

import argparse
import os
import sys
from pathlib import Path

from toyworld.samples import first_image, png
from toyworld.world import BACKGROUNDS, COLOURS, SHAPES, SIZE_PX, Scene


def centred_scene(shape: str, colour: str, background: int, direction: str = "right", score: float = 5.0) -> Scene:
    """The shape begins in the middle and will move in `direction`."""
    return Scene(shape, colour, direction, False, background, score, SIZE_PX / 2, SIZE_PX / 2)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m toyworld.first_image", description="Render a first image for the tiny checkpoint."
    )
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--shape", choices=SHAPES, default="circle")
    parser.add_argument("--colour", choices=tuple(COLOURS), default="red")
    parser.add_argument("--background", type=int, choices=range(len(BACKGROUNDS)), default=0)
    options = parser.parse_args()
    image = png(first_image(centred_scene(options.shape, options.colour, options.background)))
    new = options.out.with_name(f".{options.out.name}.{os.getpid()}")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(image)
        new.replace(options.out)
    except OSError as error:
        print(f"toyworld.first_image: {options.out} could not be written: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.colour} {options.shape}, {SIZE_PX}x{SIZE_PX}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
