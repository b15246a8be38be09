"""The version stands in pyproject.toml; every other place is written from there.

    python -m release.version [NEW] [--check]

Without NEW, the other places get the version of pyproject.toml; with NEW, all of them do (`make version VERSION=NEW`).
--check writes nothing: the exit code is 1, with a sentence, where a place has another version (`make lint`).
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from stepvideo_serve.errors import SetupError

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "pyproject.toml"
_OF_PROJECT = r'^version = "(.+)"$'
# File -> patterns whose one group is the version; each matches once.
PLACES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        SOURCE: (_OF_PROJECT,),
        "client/pyproject.toml": (_OF_PROJECT,),
        "gateway/pyproject.toml": (_OF_PROJECT, r'^    "stepvideo-client>=(.+)",$'),
        "gateway/stepvideo_gateway/__init__.py": (r'^__version__ = "(.+)"$',),
        "comfyui/pyproject.toml": (_OF_PROJECT,),
        "docker/chart/Chart.yaml": (r"^version: (.+)$", r'^appVersion: "(.+)"$'),
    }
)


def version_of(root: Path) -> str:
    """That of pyproject.toml. Raises SetupError where it states none, or more than one."""
    return _match(root / SOURCE, _OF_PROJECT)[1]


def stale(root: Path, version: str) -> list[str]:
    """The places that have another version, as "file: version"; each file is read anew."""
    found = [(name, _match(root / name, pattern)[1]) for name, patterns in PLACES.items() for pattern in patterns]
    return [f"{name}: {other}" for name, other in found if other != version]


def write(root: Path, version: str) -> None:
    """Every place gets the version. Raises SetupError for one that is not three numbers, as 1.2.3."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise SetupError(f"A version must be three numbers, as 1.2.3, got {version!r}: correct it.")
    for name, patterns in PLACES.items():
        for pattern in patterns:
            found = _match(root / name, pattern)
            text = found.string[: found.start(1)] + version + found.string[found.end(1) :]
            (root / name).write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m release.version", description="Write the version everywhere.")
    parser.add_argument("new", nargs="?", metavar="NEW", help="default: that of pyproject.toml")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a place has another one")
    args = parser.parse_args(arguments)
    try:
        version = args.new or version_of(root)
        if not args.check:
            write(root, version)
        elif others := stale(root, version):
            raise SetupError(f"Every place must have version {version}, found {', '.join(others)}: run `make version`.")
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _match(path: Path, pattern: str) -> re.Match[str]:
    found = list(re.finditer(pattern, path.read_text(encoding="utf-8"), re.MULTILINE))
    if len(found) != 1:
        raise SetupError(f"{path} must state its version once, as {pattern}, found {len(found)}: correct the file.")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
