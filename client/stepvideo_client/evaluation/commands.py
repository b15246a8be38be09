"""The commands of the extra `evaluation`: listed always, loaded when one is called.

The module of a command is named after it (batch_command.py for `batch`), and has `add_arguments(parser)` and
`run(args)`, which returns the exit code.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol, cast

from stepvideo_client.errors import InvalidInput

COMMANDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "batch": "make every clip of an evaluation set, on one server or several",
        "metrics": "measure the clips of such a folder",
        "compare": "set two such folders, presets or servers against each other",
    }
)
REQUIRED: Final = ("imageio", "imageio_ffmpeg", "PIL", "skimage", "cv2")
INSTALL: Final = "pip install 'stepvideo-client[evaluation]'"


class CommandModule(Protocol):
    """What the module of a command has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The command's own options."""

    def run(self, args: argparse.Namespace) -> int:
        """Runs the command and returns its exit code. Raises ClientError."""


def missing() -> list[str]:
    """The modules that the extra brings and that are not installed."""
    return [name for name in REQUIRED if importlib.util.find_spec(name) is None]


def load(command: str) -> CommandModule:
    """The module of a command. Raises InvalidInput where the extra is not installed."""
    if absent := missing():
        raise InvalidInput(f"stepvideo {command} needs {', '.join(absent)}, not installed here: {INSTALL}.")
    return cast(CommandModule, importlib.import_module(f"{__package__}.{command}_command"))


def add_commands(commands: Any, chosen: str | None, **parser_options: Any) -> None:
    """Adds a parser for each command to the subparsers `commands`; that of `chosen` has its options. Raises
    InvalidInput where `chosen` needs the extra and the extra is not installed."""
    hint = f" (first: {INSTALL})" if missing() else ""
    for name, about in COMMANDS.items():
        parser = commands.add_parser(name, help=f"{about}{hint}", **parser_options)
        if name == chosen:
            module = load(name)
            parser.description = module.__doc__
            module.add_arguments(parser)
            parser.set_defaults(run=module.run)
