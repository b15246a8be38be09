"""FP8 graphs of the toy-world checkpoint: calibrates, finds the layers to keep in bf16, exports text and DiT.

    python -m toyworld.fp8_graphs --out DIR [--budget 1.4]

What a user does with a checkpoint of his own, with the same three commands. Interrupted, it goes on where it was.
Exit status: that of the command that failed, or 0.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Final

from export import calibrate, sensitivity, to_onnx
from toyworld import calibration_pairs
from toyworld.evaluate import CHECKPOINT

PAIRS: Final = 4
GRAPHS: Final = ("step_llm", "hunyuan_clip", "dit_*")  # the VAE has no FP8
SHAPE: Final = ("--num-frames", "34", "--height", "64", "--width", "64")
LOOP_STEPS: Final = "8"
CALIBRATION: Final = "calibration.json"
RANKING: Final = "sensitivity.json"


def make(checkpoint: Path, out: Path, budget: float) -> int:
    """Writes `out`/graphs, and beside it what was measured on the way; returns the exit status."""
    if status := measure(checkpoint, out, budget):
        return status
    keep = json.loads((out / RANKING).read_text(encoding="utf-8"))["keep_bf16"]
    source = ["--model-dir", str(checkpoint), "--calibration", str(out / CALIBRATION)]
    kept = ["--keep-bf16", *keep] if keep else []
    return to_onnx.main([*source, *kept, "--only", *GRAPHS, "--precision", "fp8", "--out", str(out / "graphs")])


def measure(checkpoint: Path, out: Path, budget: float) -> int:
    """Writes calibration.json and sensitivity.json into `out`; returns the exit status."""
    pairs, calibration = out / "pairs", str(out / CALIBRATION)
    source = ["--model-dir", str(checkpoint), "--requests", str(pairs), *SHAPE]
    if status := calibration_pairs.write(pairs, PAIRS):
        return status
    if status := calibrate.main([*source, "--cfg-scale", "4", "--out", calibration]):
        return status
    loop = ["--steps", LOOP_STEPS, "--budget", str(budget), "--out", str(out / RANKING)]
    return sensitivity.main([*source, "--calibration", calibration, *loop])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m toyworld.fp8_graphs", description="Export the toy world in FP8.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, required=True, help="folder for the graphs and what they were made from")
    parser.add_argument("--budget", type=float, default=1.4, help="loss over that of bf16 (default %(default)s)")
    options = parser.parse_args()
    return make(options.checkpoint, options.out, options.budget)


if __name__ == "__main__":
    sys.exit(main())
