"""ONNX graphs -> TensorRT engines, each in a process of its own, with its plan checked.

    python -m export.build_engine --onnx DIR --out DIR --backend tensorrt|tensorrt_rtx --sm 89 [--only GLOB ...]
        [--shapes 544x992x102,...] [--fixed] [--layout tp2] [--model-dir DIR] [--kernels DIR] [--jobs N]
        [--plan error|warn]
    python -m export.build_engine --check ...    says what is wrong with the arguments or this machine before graphs
                                                 are exported: neither folder needs to be there

Run again, it builds only what is missing or stale. Exit status: 0 all engines are there; 1 some could not be built;
2 nothing was built because of wrong arguments or files; 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.engines.engines import Options, build_engines, check_checkpoint, check_machine
from export.engines.profiles import parse_shapes
from export.engines.report import outcome, table
from export.engines.toolkit import SMS
from stepvideo_serve.engine.manifest import Manifest
from stepvideo_serve.errors import SetupError
from stepvideo_serve.parallel.layout import Layout

BUILT, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status; argparse itself leaves with 2."""
    given = _parser().parse_args(arguments)
    try:
        return _build(given)
    except SetupError as error:
        print(f"build_engine: {error}", file=sys.stderr)
        return UNUSABLE
    except OSError as error:
        print(f"build_engine: {given.out} must be writable with room for the engines, got: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print("build_engine: interrupted; finished engines stay, run again to go on", file=sys.stderr)
        return INTERRUPTED


def _build(given: argparse.Namespace) -> int:
    options = Options(
        backend=given.backend,
        sm=given.sm,
        layout=Layout.parse(given.layout),
        videos=parse_shapes(given.shapes) if given.shapes else (),
        fixed=given.fixed,
        only=tuple(given.only),
        kernels=given.kernels,
        jobs=given.jobs,
        plan=given.plan,
    )
    if given.check:
        check_machine(options)
        return BUILT
    if given.model_dir is not None:
        check_checkpoint(given.onnx, given.model_dir)
    report = build_engines(given.onnx, given.out, options, not given.quiet)
    for folder in sorted({given.out, *(file.parent for file in given.out.glob("tp*of*/manifest.json"))}):
        print(table(Manifest.load(folder)))
    print(outcome(report, given.out))
    return FAILED if report.failed else BUILT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.build_engine", description="Build TensorRT engines from ONNX graphs."
    )
    parser.add_argument("--onnx", type=Path, required=True, help="folder of export.to_onnx")
    parser.add_argument("--out", type=Path, required=True, help="folder for the engines and their manifest")
    parser.add_argument("--backend", choices=tuple(SMS), required=True, help="which TensorRT")
    parser.add_argument("--sm", type=int, required=True, help="compute capability, such as 89 for 8.9")
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help='graphs, such as "dit_block_*"')
    parser.add_argument("--shapes", help="HEIGHTxWIDTHxFRAMES, several with commas: the largest to build for")
    parser.add_argument("--fixed", action="store_true", help="engines for the one size in --shapes")
    parser.add_argument("--layout", default="single", help='how ranks share the DiT, such as "tp2"')
    parser.add_argument("--model-dir", type=Path, help="also check that the graphs are of this checkpoint")
    parser.add_argument("--kernels", type=Path, help="folder of make kernels, for engines with plugins")
    parser.add_argument("--jobs", type=int, default=1, help="builds at a time; of tensorrt each on a GPU of its own")
    parser.add_argument("--plan", choices=("error", "warn"), default="error", help="where a plan is not as expected")
    parser.add_argument("--check", action="store_true", help="only check the arguments and this machine")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
