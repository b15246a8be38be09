"""Builds every kernel for every architecture ahead of time; needs no GPU.

    python -m stepvideo_kernels.compile --out DIR [--only GLOB ...] [--sm SM ...] [--heads H] [--jobs N]

Writes `<name>.cubin`, `.ptx` and `.json` for each, then `table.md` and `table.json`. Run again, only what changed is
built. Ends with status 1 and one sentence when a kernel does not compile or its machine code is not what it should be.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stepvideo_kernels.compile.build import compile_all
from stepvideo_kernels.kernel_spec import SMS, FullSize
from stepvideo_serve.engine.cores import usable_cores
from stepvideo_serve.errors import SetupError


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        compile_all(options.out, options.only, options.sm, FullSize(heads=options.heads), options.jobs)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stepvideo_kernels.compile", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the binaries and the table")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help='names to build, e.g. "attention.*"')
    parser.add_argument("--sm", nargs="+", type=int, choices=SMS, default=list(SMS), help="architectures to build for")
    parser.add_argument(
        "--heads", type=int, default=FullSize.heads, help="heads of the DiT: adaLN binaries have its width"
    )
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="compilers at the same time")
    return parser


if __name__ == "__main__":
    sys.exit(main())
