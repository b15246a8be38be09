"""What the graphs of a folder lose against torch in fp32: each alone, and together over a short loop.

    python -m export.parity --engines DIR                      prints the reports that the manifest holds
    python -m export.parity --engines DIR --model-dir DIR      runs the loop, records it in the manifest, prints both
        [--weight-set DIR]

The loop goes from prompt and image to latents through ONNX Runtime on the very graphs that are compiled (bf16 and FP8
ones as their fp16 twins, see compare/fp16_copy.py). fp32 graphs may be off by 1e-4 of the largest magnitude; others
may lose twice what torch loses in bf16.
Graphs that take their weights as inputs get those of the checkpoint, in FP8 of its weight set (export.quantize): there
is a report on the loop for each.
Exit status: 0 every report is there and passes; 1 one fails or is missing; 2 wrong arguments or files.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.compare.denoising import loop_report, sample_request
from stepvideo_serve.assembly.checkpoint import Checkpoint
from stepvideo_serve.assembly.layer_weights import LayerWeights
from stepvideo_serve.engine.manifest import GRAPH, LOOP, Manifest
from stepvideo_serve.engine.parity import WEIGHTS, loops_of
from stepvideo_serve.errors import ExportError, RequestError, SetupError
from stepvideo_serve.weights.files import file_digest
from stepvideo_serve.weights.weight_set import WeightSet

PASSED, FAILED, UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status; argparse itself leaves with 2."""
    options = _parser().parse_args(arguments)
    try:
        manifest = Manifest.load(options.engines)
        if options.model_dir is not None:
            manifest = _with_loop(manifest, options)
    except (SetupError, RequestError) as error:
        print(f"parity: {error}", file=sys.stderr)
        return UNUSABLE
    except OSError as error:
        print(f"parity: {options.engines} must be writable with room for twins, got: {error}", file=sys.stderr)
        return UNUSABLE
    print("\n".join([*graph_table(manifest), "", *loop_table(manifest)]))
    return PASSED if not failures(manifest) else FAILED


def failures(manifest: Manifest) -> list[str]:
    """One sentence per report that is missing, stale or does not pass."""
    return [*graph_failures(manifest), *loop_failures(manifest)]


def graph_failures(manifest: Manifest) -> list[str]:
    """Of the reports on single graphs."""
    found = []
    for name, entry in manifest.graphs.items():
        rows = entry.extras.get("parity")
        if not rows:
            found.append(f"{name} has no parity report: export it with a comparison.")
        elif wrong := [row for row in rows if not row["error"] <= row["allowed"]]:  # so that NaN fails too
            found.append(f"{name} is off by more than its report allows ({', '.join(sorted(map(_source, wrong)))}).")
    return found


def loop_failures(manifest: Manifest) -> list[str]:
    """Of the reports on loops. Engines are judged by the graphs that they were built from."""
    loops = loops_of(manifest)
    if not loops:
        return ["No loop has been compared: run python -m export.parity --model-dir."]
    return [sentence for loop in loops for sentence in _failures_of(loop, manifest)]


def _failures_of(loop: Mapping[str, Any], manifest: Manifest) -> list[str]:
    if not _is_of(loop, manifest):
        return [f"The loop{_with(loop)} was compared with other graphs: run python -m export.parity --model-dir again."]
    if not loop["passed"]:
        value, allowed = loop["value"], loop["allowed"]
        return [f"The loop{_with(loop)} must have a {loop['rule']} of at most {allowed:g}, has {value:.3g}."]
    return []


def _is_of(loop: Mapping[str, Any], manifest: Manifest) -> bool:
    """Whether a loop went through the graphs that are there."""
    keys = {name: entry.extras.get(GRAPH, entry.key) for name, entry in manifest.graphs.items()}
    return all(loop["graphs"].get(name) == key for name, key in keys.items())


def _with(loop: Mapping[str, Any]) -> str:
    """Which weights a loop had where they are inputs, by the names in the graphs' own reports."""
    found = sorted(set(loop.get(WEIGHTS, {}).values()))
    return f" with the weights {', '.join(found)}" if found else ""


def graph_table(manifest: Manifest) -> list[str]:
    """Lines: one per graph, output and what ran it, its worst shape."""
    lines = [f"{'graph':<20} {'output':<14} {'run by':<12} {'max':>8} {'allowed':>8} {'rms':>8} {'cosine':>10}"]
    for name, entry in manifest.graphs.items():
        worst: dict[tuple[str, str], dict[str, Any]] = {}
        for row in entry.extras.get("parity", []):
            key = row["output"], _source(row)
            worst[key] = max(worst.get(key, row), row, key=lambda candidate: candidate["error"])
        lines += [
            f"{name:<20} {output:<14} {source:<12} {row['error']:>8.1e} {row['allowed']:>8.1e} {row['rms']:>8.1e} "
            f"{row['cosine']:>10.7f}"
            for (output, source), row in worst.items()
        ]
    return lines


def loop_table(manifest: Manifest) -> list[str]:
    """Lines: one per step of each loop, its verdict, and what fails."""
    lines = []
    for loop in loops_of(manifest):
        lines.append(f"{'step':<6} {'max':>8} {'rms':>8} {'cosine':>10}   in bf16 {'max':>8} {'rms':>8}")
        for index, step in enumerate(loop["steps"], 1):
            ours, theirs = step["graphs"], step["bf16"]
            lines.append(
                f"{index:<6} {ours['error']:>8.1e} {ours['rms']:>8.1e} {ours['cosine']:>10.7f}           "
                f"{theirs['error']:>8.1e} {theirs['rms']:>8.1e}"
            )
        lines.append(f"{loop['rule']}{_with(loop)}: {loop['value']:.3g}, allowed {loop['allowed']:g}")
    return [*lines, *failures(manifest)]


def _source(row: Mapping[str, Any]) -> str:
    """What gave the values of a row: "onnxruntime", "torch" or "engine"."""
    return str(row["backend"])


def _with_loop(manifest: Manifest, options: argparse.Namespace) -> Manifest:
    checkpoint = Checkpoint(options.model_dir)
    weights = LayerWeights(checkpoint, weight_set=_weight_set(manifest, options))
    sizes = {"num_frames": options.num_frames, "height": options.height, "width": options.width}
    request = sample_request(checkpoint, steps=options.steps, **sizes)
    print(f"parity: {request.steps} steps in fp32, bf16 and {manifest.precision} graphs", file=sys.stderr, flush=True)
    report = loop_report(options.engines, manifest, checkpoint, weights, request, options.threads)
    current = [loop for loop in loops_of(manifest) if _is_of(loop, manifest)]
    others = [loop for loop in current if loop.get(WEIGHTS) != report.get(WEIGHTS)]
    found = [*others, report] if manifest.takes_weights else report
    manifest = replace(manifest, extra={**manifest.extra, LOOP: found})
    manifest.save(options.engines)
    return manifest


def _weight_set(manifest: Manifest, options: argparse.Namespace) -> WeightSet | None:
    """The quantised weights of graphs that take them as inputs, whole and as they were made. Raises SetupError."""
    needed = manifest.takes_weights and manifest.precision == "fp8"
    if needed != (options.weight_set is not None):
        got = "none" if options.weight_set is None else f"one with {manifest.precision}"
        raise ExportError(
            f"--weight-set goes with FP8 graphs that take their weights as inputs, got {got}: make it with "
            "python -m export.quantize."
        )
    if options.weight_set is None:
        return None
    found = WeightSet.load(options.weight_set)
    found.verify(file_digest)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.parity", description="What graphs lose against fp32.")
    parser.add_argument("--engines", type=Path, required=True, help="folder with a manifest")
    parser.add_argument("--model-dir", type=Path, help="checkpoint in the official layout: runs the loop")
    parser.add_argument("--weight-set", type=Path, metavar="DIR", help="of FP8 graphs that take weights as inputs")
    parser.add_argument("--steps", type=int, default=4, help="steps of the loop")
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of ONNX Runtime; 0 = all cores")
    return parser


if __name__ == "__main__":
    sys.exit(main())
