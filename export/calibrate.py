"""How large activations get, for FP8: runs requests through the model and writes calibration.json.

    python -m export.calibrate --model-dir DIR --requests DIR --out calibration.json [--steps 8] [--limit 4]
        [--percentile 99.999]

--requests holds pairs NAME.png and NAME.txt (first image and prompt), also in folders below. Each pair is generated in
torch with a short schedule that spans all noise levels, both guidance branches, up to the latents. Small sizes are
faster and see the same layers: --num-frames, --height, --width. A GPU is used if there is one. How long it will take is
said before it begins.
Interrupted, it goes on from the last finished pair when called again in the same way.
Exit status: 0 done; 2 nothing was written because of wrong arguments or files; 130 interrupted.
"""

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from export.compare.graph_stages import read_requests
from export.quantize.calibration import Calibration
from export.quantize.forecast import forecast_s, in_words
from export.quantize.measure import measure
from export.quantize.observers import AmaxObserver
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.errors import ExportError, RequestError, SetupError
from stepvideo_serve.request import GenerationRequest

REQUEST_OPTIONS = ("steps", "num_frames", "height", "width", "cfg_scale", "time_shift", "motion_score")
SHOWN = 5
AUTO = "auto"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status; argparse itself leaves with 2."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads or usable_cores())
    try:
        calibration = _calibrate(options)
    except (SetupError, RequestError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"calibrate: {options.out} must be writable, got: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("calibrate: interrupted; the same command goes on from the last finished request", file=sys.stderr)
        return 130
    print(_summary(calibration, options.out))
    return 0


def _calibrate(options: argparse.Namespace) -> Calibration:
    AmaxObserver(options.percentile)  # refuses a wrong percentile before the weights are read
    checkpoint = Checkpoint(options.model_dir)
    given = {name: getattr(options, name) for name in REQUEST_OPTIONS}
    requests = read_requests(
        options.requests,
        options.limit,
        checkpoint.dit_config.in_channels,
        **{name: value for name, value in given.items() if value is not None},
    )
    device = _device(options.device)
    settings = {
        **given,
        "percentile": options.percentile,
        "precision": options.precision,
        "device": device,
        "requests": _identities(requests),
    }
    partial = options.out.with_name(f".{options.out.name}.partial")
    total = sum(request.steps for request in requests.values())
    print(_announced(checkpoint, requests, options.precision, device), file=sys.stderr)
    with tqdm(total=total, desc="calibrate", unit="step", disable=options.quiet, file=sys.stderr) as bar:
        calibration = measure(checkpoint, requests, partial, settings, lambda: _advance(bar))
    calibration.save(options.out)
    return calibration


def _device(wanted: str) -> str:
    """The device that is used. Raises ExportError."""
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ExportError("--device cuda needs a GPU that torch can use, found none: use --device cpu.")
    return wanted if wanted != AUTO else "cuda" if there else "cpu"


def _announced(checkpoint: Checkpoint, requests: Mapping[str, GenerationRequest], precision: str, device: str) -> str:
    """What will be done, and how long it will take, before it begins."""
    largest = max(requests.values(), key=lambda request: request.geometry.tokens)
    size = f"{largest.num_frames} frames of {largest.height}x{largest.width}"
    steps = sum(request.steps for request in requests.values())
    seconds = forecast_s(checkpoint, requests.values(), precision, device)
    return (
        f"calibrate: {len(requests)} requests of {size}, {steps} steps together, in {precision} on {device}: about "
        f"{in_words(seconds)} once the weights are loaded; less with --limit, --steps, --num-frames, --height, --width"
    )


def _advance(bar: "tqdm[object]") -> None:
    bar.update()


def _identities(requests: Mapping[str, GenerationRequest]) -> dict[str, str]:
    """Name -> hash of image and prompt."""
    return {
        name: hashlib.sha256(request.image + request.positive_prompt.encode()).hexdigest()[:16]
        for name, request in requests.items()
    }


def _summary(calibration: Calibration, out: Path) -> str:
    ranked = sorted(calibration.amax.items(), key=lambda item: item[1], reverse=True)
    rows = [f"{'largest tensors':<56} {'amax':>10}", *(f"{name:<56} {value:>10.3f}" for name, value in ranked[:SHOWN])]
    return "\n".join([*rows, f"{len(ranked)} tensors of {len(calibration.settings['requests'])} requests in {out}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.calibrate", description="Measure ranges for FP8.")
    parser.add_argument("--model-dir", type=Path, required=True, help="checkpoint in the official layout")
    parser.add_argument("--requests", type=Path, required=True, help="folder of NAME.png and NAME.txt")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N pairs only")
    parser.add_argument("--percentile", type=float, default=100.0, help="share of values within amax; 100 = maximum")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="what torch computes in")
    parser.add_argument("--device", choices=(AUTO, "cpu", "cuda"), default=AUTO, help="auto: a GPU, if there is one")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all cores")
    parser.add_argument("--steps", type=int, default=8, help="steps of the schedule per request")
    for name, kind in (("num-frames", int), ("height", int), ("width", int)):
        parser.add_argument(f"--{name}", type=kind, help="as in a request")
    for name in ("cfg-scale", "time-shift", "motion-score"):
        parser.add_argument(f"--{name}", type=float, help="as in a request")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
