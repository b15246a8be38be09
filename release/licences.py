"""The licences of what the distributions depend on: docs/licences.md.

    python -m release.licences [--check] [--all]

Writes the document; --check writes nothing, and the exit code is 1 where the document is stale. --all prints every
package that the distributions bring into this environment, also those that a dependency brings, with its version; the
exit code is 1 where one states no licence.
"""

import argparse
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from email.message import Message
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stepvideo_serve.errors import SetupError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = "docs/licences.md"
FOLDERS = (".", "client", "gateway")
OURS = ("stepvideo-serve", "stepvideo-client", "stepvideo-gateway")
NOT_SHIPPED = ("dev",)  # extras that only a checkout has
LONGEST = 100  # characters of a metadata field that names a licence; longer ones are its text
# Not in every environment, or with other metadata in other builds.
STATED: Mapping[str, str] = MappingProxyType(
    {
        "torch": "BSD-3-Clause; its wheels hold more, under Apache-2.0, BSD-2-Clause, BSL-1.0 and MIT",
        "tensorrt-cu13": "NVIDIA's own (proprietary)",
        "tensorrt-rtx-cu13": "NVIDIA's own (proprietary)",
        "cuda-bindings": "Apache-2.0",
    }
)
HEAD = """# Licences of dependencies

<!-- written by `make licences` from the pyproject.toml files and the packages' metadata -->

This code is under Apache-2.0, and each wheel holds [LICENSE](../LICENSE). What the distributions name as dependencies:

"""
TAIL = """
- The wheels of imageio-ffmpeg hold a program, ffmpeg, that is under the GPL (version 3 or later); it runs as a process
  of its own. Those of torch for CUDA bring NVIDIA's libraries, under NVIDIA's licences.
- What these packages depend on themselves: `make licences LICENCES_ARGS=--all` lists all of the environment, with
  versions.
- The image is built on NVIDIA's Triton image, which has licences of its own. The weights are under MIT (README).
"""


def licence_of(found: Message) -> str | None:
    """What a package's metadata says, on one line: the expression, a short text, or the classifiers."""
    classifiers = [one.rpartition(" :: ")[2] for one in found.get_all("Classifier", []) if one.startswith("License ::")]
    text = (found["License"] or "").strip()
    short = text if len(text) <= LONGEST and "\n" not in text and text != "UNKNOWN" else ""
    named = [one for one in classifiers if one != "OSI Approved"]
    return found["License-Expression"] or short or ", ".join(named) or None


def named_by(root: Path) -> Iterator[tuple[str, str, Requirement]]:
    """Distribution, extra ("" for none) and requirement, for each that is not one of ours."""
    for folder in FOLDERS:
        project = tomllib.loads((root / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        groups = {"": project["dependencies"], **project.get("optional-dependencies", {})}
        for extra in (name for name in groups if name not in NOT_SHIPPED):
            for requirement in map(Requirement, groups[extra]):
                if canonicalize_name(requirement.name) not in OURS:
                    yield project["name"], extra, requirement


def document(root: Path) -> str:
    """The text of DOCUMENT. Raises SetupError for a package that states no licence, or is not in this environment."""
    rows = ["| distribution | extra | package | version | licence |", "| --- | --- | --- | --- | --- |"]
    for distribution, extra, requirement in named_by(root):
        name, version = canonicalize_name(requirement.name), str(requirement.specifier).removeprefix("==")
        rows.append(f"| {distribution} | {extra} | {name} | {version} | {STATED.get(name) or _licence(name)} |")
    return HEAD + "\n".join(rows) + "\n" + TAIL


def brought_by(requirements: Iterable[Requirement]) -> dict[str, str | None]:
    """ "name version" -> licence of all that these requirements bring into this environment; what is not installed is
    left out."""
    found: dict[str, str | None] = {}
    waiting, seen = list(requirements), set[str]()
    while waiting:
        wanted = waiting.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        name = canonicalize_name(wanted.name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[f"{name} {package.version}"] = STATED.get(name) or licence_of(_message(name))
        for line in package.requires or ():
            further = Requirement(line)
            extras = wanted.extras or {""}
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(further)
    return dict(sorted(found.items()))


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m release.licences", description="Write docs/licences.md.")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where the document is stale")
    parser.add_argument(
        "--all", action="store_true", help="print all of this environment, also what dependencies bring"
    )
    args = parser.parse_args(arguments)
    try:
        if args.all:
            _print_all(root)
            return 0
        text, path = document(root), root / DOCUMENT
        if not args.check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise SetupError(
                f"{DOCUMENT} must say what the pyproject.toml files name, it is stale: run `make licences`."
            )
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _print_all(root: Path) -> None:
    found = brought_by(requirement for _, _, requirement in named_by(root))
    for package, licence in found.items():
        print(f"{package:<50} {licence or '-'}")
    if without := [package for package, licence in found.items() if licence is None]:
        raise SetupError(f"Every package must state its licence, {', '.join(without)} do not: look at their sources.")


def _licence(name: str) -> str:
    try:
        licence = licence_of(_message(name))
    except metadata.PackageNotFoundError:
        raise SetupError(
            f"{name} must be installed to be asked for its licence, it is not: run `make setup`."
        ) from None
    if licence is None:
        raise SetupError(
            f"{name} must state its licence, its metadata do not: add it to STATED in {Path(__file__).name}."
        )
    return licence


def _message(name: str) -> Message:
    found = metadata.metadata(name)
    assert isinstance(found, Message)
    return found


if __name__ == "__main__":
    sys.exit(main())
