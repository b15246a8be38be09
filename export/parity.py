"""What the graphs of a folder lose against torch in fp32: each alone, and together over a short loop.

    python -m export.parity --engines DIR                      prints the reports that the manifest holds
    python -m export.parity --engines DIR --model-dir DIR      runs the loop, records it in the manifest, prints both

The loop goes from prompt and image to latents through ONNX Runtime on the very graphs that are compiled (bf16 and FP8
ones as their fp16 twins, see compare/fp16_copy.py). fp32 graphs may be off by 1e-4 of the largest magnitude; others
may lose twice what torch loses in bf16.
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
from stepvideo_serve.engine.manifest import GRAPH, LOOP, Manifest
from stepvideo_serve.errors import RequestError, SetupError

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
    """Of the report on the loop. Engines are judged by the graphs that they were built from."""
    loop = manifest.extra.get(LOOP)
    if loop is None:
        return ["No loop has been compared: run python -m export.parity --model-dir."]
    if any(loop["graphs"].get(name) != entry.extras.get(GRAPH, entry.key) for name, entry in manifest.graphs.items()):
        return ["The loop was compared with other graphs: run python -m export.parity --model-dir again."]
    if not loop["passed"]:
        return [f"The loop must have a {loop['rule']} of at most {loop['allowed']:g}, has {loop['value']:.3g}."]
    return []


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
    """Lines: one per step of the loop, the verdict, and what fails."""
    lines = []
    loop = manifest.extra.get(LOOP)
    if loop is not None:
        lines.append(f"{'step':<6} {'max':>8} {'rms':>8} {'cosine':>10}   in bf16 {'max':>8} {'rms':>8}")
        for index, step in enumerate(loop["steps"], 1):
            ours, theirs = step["graphs"], step["bf16"]
            lines.append(
                f"{index:<6} {ours['error']:>8.1e} {ours['rms']:>8.1e} {ours['cosine']:>10.7f}           "
                f"{theirs['error']:>8.1e} {theirs['rms']:>8.1e}"
            )
        lines.append(f"{loop['rule']}: {loop['value']:.3g}, allowed {loop['allowed']:g}")
    return [*lines, *failures(manifest)]


def _source(row: Mapping[str, Any]) -> str:
    """What gave the values of a row: "onnxruntime", "torch" or "engine"."""
    return str(row["backend"])


def _with_loop(manifest: Manifest, options: argparse.Namespace) -> Manifest:
    checkpoint = Checkpoint(options.model_dir)
    sizes = {"num_frames": options.num_frames, "height": options.height, "width": options.width}
    request = sample_request(checkpoint, steps=options.steps, **sizes)
    print(f"parity: {request.steps} steps in fp32, bf16 and {manifest.precision} graphs", file=sys.stderr, flush=True)
    report = loop_report(options.engines, manifest, checkpoint, request, options.threads)
    manifest = replace(manifest, extra={**manifest.extra, LOOP: report})
    manifest.save(options.engines)
    return manifest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.parity", description="What graphs lose against fp32.")
    parser.add_argument("--engines", type=Path, required=True, help="folder with a manifest")
    parser.add_argument("--model-dir", type=Path, help="checkpoint in the official layout: runs the loop")
    parser.add_argument("--steps", type=int, default=4, help="steps of the loop")
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of ONNX Runtime; 0 = all cores")
    return parser


if __name__ == "__main__":
    sys.exit(main())
