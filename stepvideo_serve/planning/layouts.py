"""Which layout for which GPUs: predicted memory, FLOPs, communication and time of every layout of N GPUs.

    python -m stepvideo_serve layouts --gpu H100|H200|B200|L40S --gpus N [--model-dir DIR] [--frames 102]
        [--height 544] [--width 992] [--steps 50] [--precision bf16|fp8] [--config serve.toml] [--json]

Nothing is run and no GPU is needed. Parameters, FLOPs and bytes between the ranks are exact; memory beyond the weights
and all seconds are predictions from published peaks and efficiencies (cost.py and gpus.py say which),
for guidance with two branches and texts of full length. Without --model-dir the published model is assumed. --config:
also the seconds of a request under each of its presets, as far as its price files tell their evaluations.
Exit code 2, with one sentence, for anything that cannot be planned.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import ConfigError, StepVideoError
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.memory.sizes import GIB, WEIGHT_BYTES
from stepvideo_serve.planning.cost import Prediction, layouts_of, predict
from stepvideo_serve.planning.gpus import GPU, GPUS, ONE_NODE, gpu_named
from stepvideo_serve.planning.model_size import PUBLISHED, ModelConfigs, model_size, workload
from stepvideo_serve.planning.preset_seconds import Evaluations, evaluations_by_preset, seconds_by_preset

GIGA, TERA = 1e9, 1e12
KINDS = ("sum_tp", "to_heads", "to_tokens", "gather_tokens", "exchange_branches")
MEMORY_COLUMNS = (
    *("layout", "DiT", "LLM:slice", "whole", "CLIP", "VAE", "cross K/V", "tokens", "in block", "in VAE", "CUDA"),
    *("total", "Step-LLM"),
)
STEP_COLUMNS = (
    *("layout", "TFLOP", "sum_tp", "to_heads", "to_tokens", "gather", "exchange", "compute", "sent", "step"),
    *("text", "decode", "request"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the layouts were printed, whether or not one fits; 2 when there is nothing to plan."""
    try:
        arguments = _parser().parse_args(argv)
        gpu = gpu_named(arguments.gpu)
        geometry = VideoGeometry.checked(arguments.frames, arguments.height, arguments.width)
        if arguments.steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {arguments.steps}: correct it.")
        configs = PUBLISHED if arguments.model_dir is None else ModelConfigs.load(arguments.model_dir)
        layouts = layouts_of(arguments.gpus, configs.dit.num_heads, geometry.tokens)
        size, work = model_size(configs), workload(configs, geometry, arguments.steps)
        served = None if arguments.config is None else ServeConfig.load(arguments.config)
        presets = {} if served is None else evaluations_by_preset(served, geometry, arguments.steps)
    except StepVideoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    predictions = [predict(size, layout, work, gpu, arguments.precision) for layout in layouts]
    predictions.sort(key=lambda prediction: prediction.request_s)
    chosen, reason = recommend(predictions, gpu)
    by_preset = [seconds_by_preset(one, size, work, gpu, arguments.precision, presets) for one in predictions]
    request = {
        **{name: getattr(arguments, name) for name in ("frames", "height", "width", "steps", "precision", "gpus")},
        "gpu": gpu.name,
        "tokens": work.tokens,
        "text_tokens": work.text_tokens,
    }
    if arguments.json:
        pairs = zip(predictions, by_preset, strict=True)
        described = [{**describe(prediction, gpu), "preset_s": seconds} for prediction, seconds in pairs]
        best = str(chosen.layout) if chosen else None
        print(json.dumps({**request, "layouts": described, "recommended": best, "reason": reason}, indent=2))
    else:
        print("\n".join([*report(predictions, request, gpu), *preset_report(predictions, by_preset, presets)]))
        print(f"\n{reason}")
    return 0


def recommend(predictions: Sequence[Prediction], gpu: GPU) -> tuple[Prediction | None, str]:
    """The fastest layout with which everything fits, else the fastest that fits without Step-LLM; and why, in one
    sentence. `predictions` must be sorted by time."""
    fitting = [prediction for prediction in predictions if prediction.placement is not None]
    complete = [prediction for prediction in fitting if prediction.placement != "elsewhere"]
    if not fitting:
        least = min(prediction.memory.total("elsewhere") for prediction in predictions)
        return None, (
            f"Nothing is recommended: even without Step-LLM a GPU needs {least / GIB:.0f} GiB and has "
            f"{gpu.memory_gib}, so use more GPUs, larger ones, a smaller video or --precision fp8."
        )
    chosen = (complete or fitting)[0]
    place = {"split": "Step-LLM in slices", "whole": "Step-LLM on rank 0", "elsewhere": "Step-LLM on another GPU"}
    reason = f"Recommended: {chosen.layout} with {place[chosen.placement or 'elsewhere']}, {chosen.request_s:.1f} s"
    if not complete:
        return chosen, f"{reason}, the fastest layout that fits; none leaves room for Step-LLM beside the DiT."
    if predictions[0] is chosen:
        return chosen, f"{reason}, the fastest layout, and everything fits."
    if fitting[0] is chosen:
        return chosen, f"{reason}, the fastest layout that fits."
    other = f"{fitting[0].layout} would take {fitting[0].request_s:.1f} s, but only with {place['elsewhere']}"
    return chosen, f"{reason}, the fastest layout that holds everything; {other}."


def describe(prediction: Prediction, gpu: GPU) -> dict[str, Any]:
    """All numbers of one layout, for JSON; units are in the names, bytes and seconds where there are none."""
    return {
        "layout": str(prediction.layout),
        "fits": prediction.placement is not None,
        "step_llm": prediction.placement,
        "memory_bytes": {
            **asdict(prediction.memory),
            "total": {place: prediction.memory.total(place) for place in prediction.memory.llm},
            "available": gpu.memory_bytes,
        },
        "step_flops": {**prediction.flops, "total": sum(prediction.flops.values())},
        "step_exchanges": [asdict(exchange) for exchange in prediction.exchanges],
        "step_s": asdict(prediction.step),
        "text_s": prediction.text_s,
        "decode_s": prediction.decode_s,
        "request_s": prediction.request_s,
    }


def report(predictions: Sequence[Prediction], request: Mapping[str, Any], gpu: GPU) -> list[str]:
    """The lines of the two tables."""
    video = "{frames} frames of {height}x{width} ({tokens:,} tokens), {steps} steps, {precision}".format(**request)
    lines = [
        f"{video}, {request['gpus']} x {gpu.name} ({gpu.memory_gib} GiB, {gpu.link}).",
        "Weights, FLOPs and bytes sent are exact; the other memory and all seconds are predictions.",
    ]
    if request["gpus"] > ONE_NODE:
        lines.append(f"More than {ONE_NODE} GPUs are predicted as if all of them shared one node's links.")
    memory = [MEMORY_COLUMNS, *(_memory_row(prediction) for prediction in predictions)]
    steps = [STEP_COLUMNS, *(_step_row(prediction) for prediction in predictions)]
    lines += [
        "",
        "Memory of rank 0's GPU, GiB (Step-LLM in slices or whole; in a block or in the VAE):",
        *_table(memory),
    ]
    return [*lines, "", "One step of rank 0: TFLOP, GB handed to each collective, seconds:", *_table(steps)]


def preset_report(
    predictions: Sequence[Prediction],
    seconds: Sequence[Mapping[str, float | None]],
    evaluations: Mapping[str, Evaluations | None],
) -> list[str]:
    """The lines of the table by preset; none without presets."""
    if not evaluations:
        return []
    heads = [name if its is None else f"{name} ({its.count:g})" for name, its in evaluations.items()]
    rows = [["layout", *heads]]
    for prediction, by_preset in zip(predictions, seconds, strict=True):
        rows.append([str(prediction.layout), *(_number(value, 1, 1) for value in by_preset.values())])
    lines = ["", "Seconds of a request by preset (evaluations of the DiT; - without a price for it):", *_table(rows)]
    if any(prediction.layout.cfg > 1 for prediction in predictions):
        lines.append("With cfg2 a step without guidance takes as long as one with: skipping a branch gains nothing.")
    return lines


def _memory_row(prediction: Prediction) -> list[str]:
    memory, place = prediction.memory, prediction.placement
    weights = (memory.dit, memory.llm.get("split"), memory.llm["whole"], memory.clip, memory.vae)
    working = (memory.cross_kv, memory.activations, memory.block_scratch, memory.chunk_scratch, memory.reserved)
    numbers = (*weights, *working, memory.total(place or "elsewhere"))
    return [str(prediction.layout), *(_number(number, GIB, 1) for number in numbers), place or "too large"]


def _step_row(prediction: Prediction) -> list[str]:
    sent = {exchange.collective: exchange.payload_bytes for exchange in prediction.exchanges}
    step = prediction.step
    seconds = (step.compute, step.communication, step.total, prediction.text_s, prediction.decode_s)
    return [
        str(prediction.layout),
        _number(sum(prediction.flops.values()), TERA, 0),
        *(_number(sent.get(kind), GIGA, 2) for kind in KINDS),
        *(_number(value, 1, 3) for value in seconds),
        _number(prediction.request_s, 1, 1),
    ]


def _number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


class _Parser(argparse.ArgumentParser):
    """One sentence instead of the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}: see --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m stepvideo_serve layouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", required=True, help=f"{', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="how many of them")
    parser.add_argument("--model-dir", type=Path, metavar="DIR", help="a checkpoint; default: the published sizes")
    for name, default in (("frames", 102), ("height", 544), ("width", 992), ("steps", 50)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--precision", choices=tuple(WEIGHT_BYTES), default="bf16", help="default: %(default)s")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a serve.toml: its presets and price files")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")
    return parser
