"""Which layers suffer from FP8: quantises one group at a time and ranks them by what that does to the latents.

    python -m export.sensitivity --model-dir DIR --calibration FILE [--by layer|block|kind] [--budget 2] [--out FILE]
                                 [--precision fp8|nvfp4] [--weights constant|input]

Each group runs one short loop in torch, everything else in fp32, from prompt and image to latents. With --budget R the
groups to keep in bf16 are printed as arguments of export.to_onnx: quantising the others is expected to lose at most R
times what torch loses in bf16 (root mean square of the latents' error). With --weights input the scales are those of
graphs that take their weights as inputs (FP8 only).
Exit status: 0 done; 2 wrong arguments or files.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from export.compare.denoising import sample_request
from export.compare.graph_stages import read_requests
from export.graphs.recipe import CONSTANT, INPUT, WEIGHTS, require_weights
from export.quantize.calibration import Calibration, write_json
from export.quantize.sensitivity import GROUPINGS, Sensitivity, globs, measure_sensitivity
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.errors import RequestError, SetupError
from stepvideo_serve.request import GenerationRequest


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status; argparse itself leaves with 2."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads or usable_cores())
    try:
        checkpoint = Checkpoint(options.model_dir)
        calibration = Calibration.load(options.calibration)
        groups = globs(checkpoint, options.by)
        request = _request(options, checkpoint)
        with tqdm(total=len(groups), desc="sensitivity", unit="group", disable=options.quiet, file=sys.stderr) as bar:
            found = measure_sensitivity(
                checkpoint,
                calibration,
                request,
                groups,
                lambda: _advance(bar),
                options.precision,
                weights_outside=_outside(options),
            )
        keep = None if options.budget is None else found.keep(options.budget)
        if options.out is not None:
            write_json(options.out, found.to_json() | {"budget": options.budget, "keep_bf16": keep})
    except (SetupError, RequestError) as error:
        print(f"sensitivity: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sensitivity: {options.out} must be writable, got: {error}", file=sys.stderr)
        return 2
    print(_table(found))
    if keep is not None:
        print(f"--keep-bf16 {shlex.join(keep)}" if keep else "nothing needs to be kept in bf16")
    return 0


def _request(options: argparse.Namespace, checkpoint: Checkpoint) -> GenerationRequest:
    sizes = {name: getattr(options, name) for name in ("steps", "num_frames", "height", "width")}
    if options.requests is None:
        return sample_request(checkpoint, **sizes)
    found = read_requests(options.requests, 1, checkpoint.dit_config.in_channels, **sizes)
    return next(iter(found.values()))


def _outside(options: argparse.Namespace) -> bool:
    """Raises ExportError for NVFP4, whose weights are in the graphs."""
    require_weights(options.weights, options.precision)
    return bool(options.weights == INPUT)


def _advance(bar: "tqdm[object]") -> None:
    bar.update()


def _table(found: Sensitivity) -> str:
    rows = [f"{'quantised alone':<56} {'rms':>9} {'of bf16':>8} {'max':>9} {'cosine':>10}"]
    rows += [
        f"{effect.glob:<56} {effect.rms:>9.2e} {effect.rms / found.bf16_rms:>8.2f} {effect.error:>9.2e} "
        f"{effect.cosine:>10.7f}"
        for effect in found.effects
    ]
    return "\n".join([*rows, f"{'everything in bf16':<56} {found.bf16_rms:>9.2e} {1:>8.2f}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.sensitivity", description="Rank layers by FP8's effect.")
    parser.add_argument("--model-dir", type=Path, required=True, help="checkpoint in the official layout")
    parser.add_argument("--calibration", type=Path, required=True, help="from export.calibrate")
    parser.add_argument(
        "--precision", choices=("fp8", "nvfp4"), default="fp8", help="of linear layers; default: %(default)s"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default=CONSTANT, help="in the graphs, or inputs of them")
    parser.add_argument("--by", choices=GROUPINGS, default="layer", help="what is quantised together")
    parser.add_argument("--budget", type=float, metavar="R", help="print what to keep in bf16 to lose R times as much")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the ranking here, as JSON")
    parser.add_argument("--requests", type=Path, metavar="DIR", help="take the first pair; by default a smooth picture")
    parser.add_argument("--steps", type=int, default=4, help="steps of the loop")
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all cores")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
