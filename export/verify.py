"""Recomputes golden tensors of the official code with this package, and says where the two agree; or says what engines
lose.

    python -m export.verify --model-dir DIR --goldens DIR [--backend eager|ort] [--onnx DIR] [--json PATH]
    python -m export.verify --engines DIR [--gpu --model-dir DIR [--calibration FILE]]
        [--constants DIR [--weight-set DIR]]

"eager" runs the torch modules in fp32, "ort" the exported ONNX graphs in ONNX Runtime: those in --onnx, or, without
it, ones exported for the occasion. Goldens whose weights are made by rule need no --model-dir.
With --engines the parity reports of an engine directory are printed; --gpu first runs its engines on this machine's GPU
and adds what they give (compare/engines.py). --constants names engines with their weights inside, of which one of each
kind is timed beside one of --engines (compare/both_ways.py).
Exit status: 0 all compared entries agree; 1 some do not, or nothing could be compared; 2 nothing was verified because
of wrong arguments or files.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from export.compare.both_ways import time_both_ways
from export.compare.engines import compare_engines, gpu_opener
from export.compare.engines import report as engine_report
from export.goldens.by_rule import is_by_rule, verify_by_rule
from export.goldens.folder import Goldens
from export.goldens.networks import BACKENDS, open_networks
from export.goldens.recompute import verify_goldens
from export.goldens.report import Report
from stepvideo_serve.errors import ExportError, SetupError

PASSED, FAILED, UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status; argparse itself leaves with 2."""
    options = _parser().parse_args(arguments)
    try:
        if options.engines is not None:
            return _engines(options)
        with torch.no_grad():
            report = _verify(options.model_dir, options.goldens, options.backend, options.onnx)
        print(report)
        if options.json is not None:
            _write_json(report, options)
    except SetupError as error:
        print(f"verify: {error}", file=sys.stderr)
        return UNUSABLE
    except OSError as error:
        print(f"verify: the manifest in {options.engines} must be writable, got: {error}", file=sys.stderr)
        return UNUSABLE
    return PASSED if report.passed else FAILED


def _engines(options: argparse.Namespace) -> int:
    if options.goldens is not None:
        raise ExportError("--engines and --goldens are two verifications, got both: run them one after the other.")
    if options.gpu:
        if options.model_dir is None:
            raise ExportError("--gpu compares engines with their checkpoint, got no --model-dir: add it.")
        compare_engines(options.engines, options.model_dir, options.calibration, gpu_opener)
    lines, passed = engine_report(options.engines)
    if options.constants is not None:
        lines += _both_ways(options)
    print("\n".join(lines))
    return PASSED if passed else FAILED


def _both_ways(options: argparse.Namespace) -> list[str]:
    if not options.gpu:
        raise ExportError("--constants times engines on a GPU, got no --gpu: add it.")
    rows = time_both_ways(options.engines, options.constants, options.model_dir, options.weight_set, gpu_opener)
    return [str(row) for row in rows]


def _verify(model_dir: Path | None, folder: Path | None, backend: str, onnx: Path | None) -> Report:
    if folder is None:
        raise ExportError("There must be something to verify, got neither --goldens nor --engines: add one.")
    if not folder.is_dir():
        raise ExportError(f"--goldens must be a folder of golden tensors, found no folder {folder}.")
    if onnx is not None and backend != "ort":
        raise ExportError("--onnx goes with --backend ort, got --backend eager: add --backend ort.")
    if is_by_rule(folder):
        if backend != "eager":
            raise ExportError(f"{folder} has no checkpoint to export graphs from: use --backend eager.")
        if model_dir is not None:
            _progress(f"the weights of {folder} are made by rule: --model-dir is not used")
        return verify_by_rule(folder, _progress)
    if model_dir is None:
        raise ExportError(f"{folder} holds goldens of a checkpoint, got no --model-dir: add it.")
    goldens = Goldens.open(folder)
    with open_networks(model_dir, backend, onnx) as networks:
        return verify_goldens(goldens, networks, _progress)


def _progress(line: str) -> None:
    print(f"verify: {line}", file=sys.stderr, flush=True)


def _write_json(report: Report, options: argparse.Namespace) -> None:
    inputs = {
        "model_dir": None if options.model_dir is None else str(options.model_dir),
        "goldens": str(options.goldens),
        "backend": options.backend,
    }
    try:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(inputs | report.to_json(), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise ExportError(f"--json must be a path that can be written, got {options.json}: {error}.") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.verify",
        description="Compare with the official code, or check engines.",
    )
    parser.add_argument("--model-dir", type=Path, help="checkpoint in the official layout")
    parser.add_argument("--goldens", type=Path, help="folder of golden tensors")
    parser.add_argument("--backend", choices=BACKENDS, default="eager", help="torch modules, or ONNX graphs")
    parser.add_argument("--onnx", type=Path, metavar="DIR", help="exported graphs for --backend ort")
    parser.add_argument("--engines", type=Path, metavar="DIR", help="print the parity reports of these engines")
    parser.add_argument("--gpu", action="store_true", help="run the engines, and add what they give to their reports")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="of the engines, for FP8 and NVFP4 with --gpu")
    parser.add_argument(
        "--constants",
        type=Path,
        metavar="DIR",
        help="with --gpu: time these engines, which have their weights inside, too",
    )
    parser.add_argument("--weight-set", type=Path, metavar="DIR", help="of quantised engines, with --constants")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the report here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
