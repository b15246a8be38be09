"""Looks at all that a server needs, before a start, and says what to put right.

    python -m stepvideo_serve doctor [--config serve.toml] [--json]     # and the options of `serve`

A table of checks: ok, warning, fault, or not looked at, with the remedy under each warning and fault. Nothing is
started and nothing is changed. Exit code 1 only for faults. --json: {"config": FILE, "checks": [{"check", "level",
"found", "remedy"}], "levels": {level: count}}.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

from stepvideo_serve.config import ENVIRONMENT_VARIABLE, ServeConfig
from stepvideo_serve.doctor.case import Case
from stepvideo_serve.doctor.finding import Finding, Findings, Level, fault, ok, unseen
from stepvideo_serve.errors import SetupError, StepVideoError
from stepvideo_serve.launch.options import ServerOptions, add_server_arguments, server_options

PORTS: Final = (8001, 8000, 8002)
CONFIGURATION: Final = "configuration"
CHECKS: Final[Mapping[str, tuple[str, str]]] = {
    "server": ("of_machine", "server"),
    "ports": ("of_machine", "ports"),
    "proxies": ("of_machine", "proxies"),
    "shared memory": ("of_machine", "shared_memory"),
    "limits": ("of_machine", "limits"),
    "cores": ("of_machine", "cores"),
    "disk": ("of_machine", "disk"),
    "log": ("of_machine", "log"),
    "checkpoint": ("of_checkpoint", "checkpoint"),
    "tokenizers": ("of_checkpoint", "tokenizers"),
    "rights": ("of_checkpoint", "rights"),
    "engines": ("of_engines", "engines"),
    "kernels": ("of_engines", "kernels"),
    "driver": ("of_gpus", "driver"),
    "gpus": ("of_gpus", "gpus"),
    "gpu memory": ("of_gpus", "gpu_memory"),
    "communication": ("of_gpus", "communication"),
}
"""Check -> module of this folder and function. A module is imported for its check: a package that is missing is what
that check finds."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    check: str
    level: Level
    found: str
    remedy: str


def examine(path: Path, options: ServerOptions, environ: Mapping[str, str]) -> list[Row]:
    """All checks in their order; behind a configuration that is faulty, nothing can be looked at."""
    try:
        case = Case(path, ServeConfig.load(path), options, environ)
        rows = [_row(CONFIGURATION, finding) for finding in _look(_configuration, case)]
    except SetupError as error:
        rows = [_row(CONFIGURATION, fault(str(error), "correct the file; serve.toml explains every key"))]
    if any(row.level is Level.FAULT for row in rows):
        later = unseen("The configuration must be put right first.")
        return [*rows, *(_row(check, later) for check in CHECKS)]
    for check, (module, function) in CHECKS.items():
        rows += [_row(check, finding) for finding in _look(_lazily(module, function), case)]
    return rows


def _configuration(case: Case) -> Findings:
    """The file, its layout, the GPUs of its stages, and its price files."""
    from stepvideo_serve.memory.placement import Placement
    from stepvideo_serve.planning.prices import PriceBook

    model, layout = case.config.model, case.layout
    Placement.of(case.config)
    PriceBook.load(case.config.pricing.files)
    yield ok(f"{case.path}: {model.backend}, {model.precision}, {model.device}, layout {layout}.")


def _lazily(module: str, function: str) -> Callable[[Case], Findings]:
    def look(case: Case) -> Findings:
        found: Callable[[Case], Findings] = getattr(import_module(f"stepvideo_serve.doctor.{module}"), function)
        yield from found(case)

    return look


def _look(check: Callable[[Case], Findings], case: Case) -> Iterator[Finding]:
    """What the check finds; its own end by an exception is a fault, too."""
    try:
        yield from check(case)
    except StepVideoError as error:
        yield fault(str(error), "put right what the sentence names")
    except ImportError as error:
        name = error.name or "a package"
        yield fault(
            f"The package {name} must be installed, it is not: {error}.", "make setup, or use the server's image"
        )
    except Exception as error:  # a fault of the doctor must not hide what the other checks find
        yield fault(f"The check failed: {type(error).__name__}: {error}.", "report it, with the output of --json")


def _row(check: str, finding: Finding) -> Row:
    return Row(check, finding.level, finding.found, finding.remedy)


def counted(rows: Sequence[Row]) -> dict[str, int]:
    """Level -> how many rows have it."""
    return {level.value: sum(row.level is level for row in rows) for level in Level}


def table(rows: Sequence[Row]) -> str:
    """For people: level, check and sentence, the remedy below, and a line with the sums."""
    width = max(len(row.check) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.level.value:<13}  {row.check:<{width}}  {row.found}")
        if row.remedy:
            lines.append(f"{'':<13}  {'':<{width}}  -> {row.remedy}")
    sums = ", ".join(f"{count} {level}" for level, count in counted(rows).items() if count)
    return "\n".join([*lines, "", sums])


def main(argv: Sequence[str] | None = None) -> int:
    """0 without a fault, 1 with one, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stepvideo_serve doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_arguments(parser, PORTS)
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")
    arguments = parser.parse_args(argv)
    path = arguments.config or Path(os.environ.get(ENVIRONMENT_VARIABLE) or "serve.toml")
    try:
        rows = examine(path, server_options(arguments), os.environ)
    except SetupError as error:  # of the options, as `serve` would say
        rows = [Row("options", Level.FAULT, str(error), "correct the command line")]
    if arguments.json:
        print(
            json.dumps(
                {"config": str(path), "checks": [asdict(row) for row in rows], "levels": counted(rows)}, indent=2
            )
        )
    else:
        print(table(rows))
    sys.stdout.flush()
    return 1 if any(row.level is Level.FAULT for row in rows) else 0
