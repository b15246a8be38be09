"""Which layout for which GPUs: predicted memory, FLOPs, communication and time of every layout of N GPUs.

    python -m stepvideo_serve layouts --gpu H100|H200|B200|L40S --gpus N [--model-dir DIR] [--frames 102]
        [--height 544] [--width 992] [--both-orientations] [--steps 50] [--precision bf16|fp8] [--config serve.toml]
        [--gpu-hour PRICE] [--json]

Nothing is run and no GPU is needed. Parameters, FLOPs and bytes between the ranks are exact; memory beyond the weights
(memory/) and all seconds are predictions from published peaks and efficiencies (cost.py and gpus.py say which), for
guidance with two branches and texts of full length, and engines for videos of this size alone, or with
--both-orientations of this size and the same turned by 90 degrees. In FP8 no layer is kept in bf16. Without --model-dir
the published model is assumed. The last table is for throughput: the GPUs as one group or as several, each with the
layout that is recommended for it, and what a video costs in seconds of GPUs; with --gpu-hour also in money. --config:
also the seconds of a request under each of its presets, as far as its price files tell their evaluations.
Exit code 2, with one sentence, for anything that cannot be planned.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from stepvideo_serve.config import ServeConfig
from stepvideo_serve.errors import ConfigError, StepVideoError
from stepvideo_serve.geometry import VideoGeometry
from stepvideo_serve.memory.sizes import GIB, ModelSize, Workload
from stepvideo_serve.planning.cost import Prediction, layouts_of
from stepvideo_serve.planning.gpus import EFFICIENCY, GPU, GPUS, ONE_NODE, gpu_named
from stepvideo_serve.planning.groups import Group, predictions_of
from stepvideo_serve.planning.model_size import PUBLISHED, ModelConfigs, model_size, workload
from stepvideo_serve.planning.preset_seconds import Evaluations, evaluations_by_preset, seconds_by_preset

GIGA, TERA = 1e9, 1e12
KINDS = ("sum_tp", "to_heads", "to_tokens", "gather_tokens", "exchange_branches")
MEMORY_COLUMNS = (
    *("layout", "GPU", "weights", "activations", "cross K/V", "tokens", "NCCL", "contexts", "rest", "total"),
    *("emptiest", "Step-LLM"),
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
        if arguments.gpu_hour is not None and not 0 <= arguments.gpu_hour < math.inf:
            raise ConfigError(f"--gpu-hour must be a price, 0 or more, got {arguments.gpu_hour}: correct it.")
        configs = PUBLISHED if arguments.model_dir is None else ModelConfigs.load(arguments.model_dir)
        layouts = layouts_of(arguments.gpus, configs.dit.num_heads, geometry.tokens)
        size = model_size(configs)
        work = workload(configs, geometry, arguments.steps, arguments.both_orientations)
        served = None if arguments.config is None else ServeConfig.load(arguments.config)
        presets = {} if served is None else evaluations_by_preset(served, geometry, arguments.steps)
    except StepVideoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    predictions = predictions_of(layouts, size, work, gpu, arguments.precision)
    chosen, reason = recommend(predictions, gpu)
    groups = groups_of(arguments.gpus, configs.dit.num_heads, size, work, gpu, arguments.precision)
    by_preset = [seconds_by_preset(one, size, work, gpu, arguments.precision, presets) for one in predictions]
    request = {
        **{name: getattr(arguments, name) for name in ("frames", "height", "width", "steps", "precision", "gpus")},
        "both_orientations": arguments.both_orientations,
        "gpu": gpu.name,
        "tokens": work.tokens,
        "text_tokens": work.text_tokens,
    }
    if arguments.json:
        pairs = zip(predictions, by_preset, strict=True)
        described = [{**describe(prediction, gpu), "preset_s": seconds} for prediction, seconds in pairs]
        best = str(chosen.layout) if chosen else None
        throughput = [group.to_json(arguments.gpu_hour) for group in groups]
        found = {"layouts": described, "groups": throughput, "recommended": best, "reason": reason}
        print(json.dumps({**request, **found}, indent=2))
    else:
        tables = [*report(predictions, request, gpu), *preset_report(predictions, by_preset, presets)]
        print("\n".join([*tables, *group_report(groups, arguments.gpu_hour)]))
        print(f"\n{reason}")
    return 0


def recommend(predictions: Sequence[Prediction], gpu: GPU) -> tuple[Prediction | None, str]:
    """The fastest layout with which everything fits, else the fastest that fits without Step-LLM; and why, in one
    sentence. `predictions` must be sorted by time."""
    fitting = [prediction for prediction in predictions if prediction.placement is not None]
    complete = [prediction for prediction in fitting if prediction.placement != "elsewhere"]
    if not fitting:
        least = min(prediction.needs_bytes("elsewhere") for prediction in predictions)
        return None, (
            f"Nothing is recommended: even without Step-LLM a GPU needs {least / GIB:.0f} GiB and has "
            f"{gpu.memory_gib}, so use more GPUs, larger ones, a smaller video or --precision fp8."
        )
    chosen = (complete or fitting)[0]
    whole = f"Step-LLM whole on GPU {min(1, predictions[0].layout.world_size - 1)}"
    place = {"split": "Step-LLM in slices", "whole": whole, "elsewhere": "Step-LLM on another GPU"}
    reason = f"Recommended: {chosen.layout} with {place[chosen.placement or 'elsewhere']}, {chosen.request_s:.1f} s"
    if not complete:
        return chosen, f"{reason}, the fastest layout that fits; none leaves room for Step-LLM beside the DiT."
    if predictions[0] is chosen:
        return chosen, f"{reason}, the fastest layout, and everything fits."
    if fitting[0] is chosen:
        return chosen, f"{reason}, the fastest layout that fits."
    other = f"{fitting[0].layout} would take {fitting[0].request_s:.1f} s, but only with {place['elsewhere']}"
    return chosen, f"{reason}, the fastest layout that holds everything; {other}."


def groups_of(gpus: int, heads: int, size: ModelSize, work: Workload, gpu: GPU, precision: str) -> list[Group]:
    """The GPUs as one group, two, ...: those of whose GPUs the layout that is recommended holds everything, Step-LLM
    included. heads: of the DiT."""
    groups = []
    for each in (divisor for divisor in range(gpus, 0, -1) if gpus % divisor == 0):
        try:
            layouts = layouts_of(each, heads, work.tokens)
        except ConfigError:  # no layout has so many ranks
            continue
        chosen, _ = recommend(predictions_of(layouts, size, work, gpu, precision), gpu)
        if chosen is not None and chosen.placement in ("split", "whole"):
            groups.append(Group(gpus // each, each, chosen.layout, chosen.placement, chosen.request_s))
    return groups


def describe(prediction: Prediction, gpu: GPU) -> dict[str, Any]:
    """All numbers of one layout, for JSON; units are in the names, bytes and seconds where there are none."""
    return {
        "layout": str(prediction.layout),
        "fits": prediction.placement is not None,
        "step_llm": prediction.placement,
        "memory_bytes": {
            "holdings": [
                {"process": holding.process, "gpu": holding.gpu, **holding.parts, "total": holding.total}
                for holding in prediction.chosen_memory.holdings
            ],
            "fullest_gpu": {place: prediction.needs_bytes(place) for place in prediction.memory},
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
        "Memory of the fullest GPU, GiB, of all processes on it (--json: of each), and of the emptiest:",
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


def group_report(groups: Sequence[Group], gpu_hour: float | None) -> list[str]:
    """The lines of the table for throughput; none where nothing fits."""
    if not groups:
        return []
    priced = [] if gpu_hour is None else ["cost"]
    rows: list[list[str]] = [["groups", "layout", "Step-LLM", "request", "videos/h", "GPU-s/video", *priced]]
    for group in groups:
        numbers = [_number(group.request_s, 1, 1), _number(group.videos_per_hour, 1, 1), _number(group.gpu_s, 1, 0)]
        cost = [] if gpu_hour is None else [f"{group.cost(gpu_hour):.3f}"]
        rows.append([f"{group.count} x {group.gpus}", str(group.layout), group.step_llm, *numbers, *cost])
    return ["", "As groups of GPUs, each with its best layout, one video at a time on each (seconds):", *_table(rows)]


def _memory_row(prediction: Prediction) -> list[str]:
    memory = prediction.chosen_memory
    by_gpu, gpu = memory.by_gpu, memory.fullest
    held = [holding.parts for holding in memory.on(gpu)]
    numbers = [sum(parts[purpose] for parts in held) for purpose in held[0]]
    totals = (*numbers, by_gpu[gpu], min(by_gpu.values()))
    row = [str(prediction.layout), str(gpu), *(_number(number, GIB, 1) for number in totals)]
    return [*row, prediction.placement or "too large"]


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
    parser.add_argument("--both-orientations", action="store_true", help="engines take the size turned, too")
    parser.add_argument("--precision", choices=tuple(EFFICIENCY), default="bf16", help="default: %(default)s")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a serve.toml: its presets and price files")
    parser.add_argument("--gpu-hour", type=float, metavar="PRICE", help="of one GPU: what a video costs, in that money")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")
    return parser
