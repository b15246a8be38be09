"""One set made twice by `stepvideo batch`, once for each side of a comparison."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NoReturn

from stepvideo_client.errors import InvalidInput
from stepvideo_client.evaluation.commands import load
from stepvideo_client.evaluation.endpoints import refuse_undeliverable

FORM: Final = "URL,NAME=VALUE,..."
_NAME: Final = re.compile(r"[a-z][a-z-]*")
_OURS: Final = ("set", "out", "url", "latents", "dry-run", "shard")


def side_of(evaluation_set: Path, out: Path, side: str, both: Sequence[str], latents: bool) -> argparse.Namespace:
    """What batch is asked for, for the clips of one side in `out`.

    side: as FORM, several servers one after another. both: NAME=VALUE of either side; a name that is given twice has
    several values, one without a value is a switch. latents: whether batch keeps the final latents. Raises InvalidInput
    for what is no option of batch, and for what the servers do not deliver.
    """
    servers, options = _side(side)
    words = ["--out", str(out), "--url", *servers, *(["--latents"] if latents else [])]
    for name, values in _values([*both, *options]).items():
        words += [f"--{name}", *values]
    parser = _Parser(prog="stepvideo compare", add_help=False, allow_abbrev=False)
    load("batch").add_arguments(parser)
    args = parser.parse_args([str(evaluation_set), *words])
    refuse_undeliverable(args.url, args.latents, args.negative_prompt, args.positive_suffix)
    return args


def make_side(args: argparse.Namespace) -> int:
    """Makes them; goes on with what is there. Returns the exit code of batch. Raises its ClientError or OSError."""
    return load("batch").run(args)


class _Parser(argparse.ArgumentParser):
    """Its errors are those of this program's other input."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"--a, --b and --with must be what batch takes, got: {message.rstrip('.')}.")


def _side(text: str) -> tuple[list[str], list[str]]:
    """Servers and options of one side."""
    words = [word.strip() for word in text.split(",")]
    servers = [word for word in words if "=" not in word]
    if not servers or not all(words) or words[: len(servers)] != servers:
        raise InvalidInput(f"--a and --b must be {FORM}, got {text[:200]!r}: begin with a server.")
    return servers, words[len(servers) :]


def _values(options: Iterable[str]) -> dict[str, list[str]]:
    """The values of each option."""
    found: dict[str, list[str]] = {}
    for option in options:
        name, separator, value = option.partition("=")
        if not _NAME.fullmatch(name) or name in _OURS:
            raise InvalidInput(f"--a, --b and --with take options of batch as NAME=VALUE, got {option[:200]!r}.")
        found.setdefault(name, []).extend([value] if separator else [])
    return found
