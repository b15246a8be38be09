"""FP8 weights of a checkpoint for graphs whose weights are inputs (--weights input), made once for all layouts.

    python -m export.quantize --model-dir DIR --calibration FILE --out DIR [--keep-bf16 GLOB ...]

Run again, it makes only the shards that are missing, or all of them when checkpoint, calibration or layers changed.
Exit status: 0 the set is there; 2 wrong arguments or files; 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.quantize.calibration import Calibration
from export.quantize.fp8 import Fp8
from export.quantize.weight_set import make_weight_set
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.errors import SetupError

GIB = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status; argparse itself leaves with 2."""
    given = _parser().parse_args(arguments)
    try:
        fp8 = Fp8(Calibration.load(given.calibration), tuple(given.keep_bf16))
        made = make_weight_set(Checkpoint(given.model_dir), fp8, given.out, not given.quiet)
    except SetupError as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"quantize: {given.out} must be writable with room for the weights, got: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quantize: interrupted; finished shards stay, run again to go on", file=sys.stderr)
        return 130
    size = sum(shard.size_bytes for shard in made.shards.values())
    print(f"{len(made.shards)} shards, {size / GIB:.2f} GiB, in {given.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.quantize", description="Make the FP8 weights of a checkpoint."
    )
    parser.add_argument("--model-dir", type=Path, required=True, help="checkpoint in the official layout")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE", help="from export.calibrate")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards and weights.json")
    parser.add_argument("--keep-bf16", nargs="+", default=[], metavar="GLOB", help="layers not to quantise")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
