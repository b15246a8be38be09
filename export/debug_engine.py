"""Prints Polygraphy's command lines for an engine that cannot be built or computes something else than its graph.

    python -m export.debug_engine --engines DIR --graph dit_block [--onnx DIR/onnx] [--shapes 544x992x102] [--out DIR]

DIR is the engine directory of export.build_engine, also when the build of this engine failed. --graph names a graph,
or a kind of which the first is taken. What the lines need is written below --out (engines/debug_lines.py); they are
run there.
Exit status: 0 they were printed; 2 wrong arguments or files.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from export.engines.debug_lines import Debugged, environment, lines, prepare
from export.engines.profiles import parse_shapes, profile_spec
from export.engines.toolkit import link_libraries
from stepvideo_serve.engine.manifest import EngineTarget, Manifest
from stepvideo_serve.errors import ExportError, SetupError
from stepvideo_serve.parallel.layout import Layout

PRINTED, UNUSABLE = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status; argparse itself leaves with 2."""
    given = _parser().parse_args(arguments)
    try:
        debugged = _debugged(given)
        folder = given.out / debugged.spec.name
        prepare(debugged, folder)
        _print(debugged, folder)
    except (SetupError, OSError) as error:
        print(f"debug_engine: {error}", file=sys.stderr)
        return UNUSABLE
    return PRINTED


def _debugged(given: argparse.Namespace) -> Debugged:
    onnx = given.onnx or given.engines / "onnx"
    engines, graphs = Manifest.load(given.engines), Manifest.load(onnx)
    target = EngineTarget.of(engines, given.engines)
    name = _name(given.graph, graphs)
    source = graphs.graph(name)
    videos = parse_shapes(given.shapes) if given.shapes else ()
    built = engines.graphs.get(name)
    spec = built.spec if built else profile_spec(source.spec, videos, False, Layout.parse(target.layout).sp)
    return Debugged(onnx / source.file, given.engines / f"{name}.engine", spec, target)


def _name(asked: str, graphs: Manifest) -> str:
    """The graph of this name, or the first of this kind."""
    found = sorted(name for name in graphs.graphs if name == asked or name.startswith(f"{asked}_"))
    if not found:
        known = ", ".join(graphs.graphs)
        raise ExportError(f"--graph must be a graph or a kind of graphs, got {asked!r}: name one of {known}.")
    return found[0]


def _print(debugged: Debugged, folder: Path) -> None:
    variables = environment(debugged.target, link_libraries(folder / "lib"))
    print(f"# {debugged.spec.name} for {debugged.target}")
    print(f"cd {shlex.quote(str(folder.absolute()))}")
    print("export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()))
    for line in lines(debugged, folder):
        print(f"\n{line}")
    print("\n# Which layers lose precision is said by python -m export.sensitivity; KEEP_BF16 keeps them in bf16.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export.debug_engine", description="How to look into an engine.")
    parser.add_argument("--engines", type=Path, required=True, help="folder of export.build_engine")
    parser.add_argument("--graph", required=True, help='graph or kind, such as "dit_block"')
    parser.add_argument("--onnx", type=Path, help="folder of export.to_onnx; onnx in that of the engines by default")
    parser.add_argument("--shapes", help="as for export.build_engine, where the engine has not been built")
    parser.add_argument("--out", type=Path, default=Path("build/debug"), help="folder for what the lines need")
    return parser


if __name__ == "__main__":
    sys.exit(main())
