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


def make(checkpoint: Path, out: Path, budget: float) -> int:
    """Writes `out`/graphs, and beside it what was measured on the way; returns the exit status."""
    pairs, calibration, ranking = out / "pairs", out / "calibration.json", out / "sensitivity.json"
    model = ["--model-dir", str(checkpoint)]
    requests = ["--requests", str(pairs), *SHAPE]
    measured = ["--calibration", str(calibration)]
    if status := calibration_pairs.write(pairs, PAIRS):
        return status
    if status := calibrate.main([*model, *requests, "--cfg-scale", "4", "--out", str(calibration)]):
        return status
    loop = [*requests, "--steps", LOOP_STEPS, "--budget", str(budget), "--out", str(ranking)]
    if status := sensitivity.main([*model, *measured, *loop]):
        return status
    keep = json.loads(ranking.read_text(encoding="utf-8"))["keep_bf16"]
    kept = ["--keep-bf16", *keep] if keep else []
    graphs = ["--only", *GRAPHS, "--precision", "fp8", "--out", str(out / "graphs")]
    return to_onnx.main([*model, *measured, *kept, *graphs])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m toyworld.fp8_graphs", description="Export the toy world in FP8.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, required=True, help="folder for the graphs and what they were made from")
    parser.add_argument("--budget", type=float, default=1.4, help="loss over that of bf16 (default %(default)s)")
    options = parser.parse_args()
    return make(options.checkpoint, options.out, options.budget)


if __name__ == "__main__":
    sys.exit(main())
