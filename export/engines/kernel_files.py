"""The machine code that engines with plugins run: copied beside the engines, and named by hash in their manifest.

A description (`<name>.json`) has the hash of its machine code (`<name>.cubin`), and the manifest has the hash of the
description: who can write the folder of the kernels, but not the manifest, cannot have other code run.
"""

import fnmatch
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from stepvideo_serve.errors import ExportError


@dataclass(frozen=True)
class KernelFile:
    """A description and its machine code, as `make kernels` wrote them."""

    description: Path
    cubin: Path
    sha256: str


def chosen_kernels(source: Path, sm: int) -> list[KernelFile]:
    """The kernels in `source` that production uses on an architecture; raises ExportError where one is not whole, or
    there are none."""
    names = fnmatch.filter([path.name for path in source.glob("*.json")], f"*.sm{sm}.*.json")
    found = [kernel for name in sorted(names) if (kernel := _kernel(source / name)) is not None]
    if not found:
        raise ExportError(
            f"--kernels must be a folder of `make kernels` with kernels for SM {sm}, {source} has none: build them."
        )
    return found


def copy_kernels(source: Path, out: Path, sm: int) -> dict[str, str]:
    """Brings the kernels of `out` up to date with those in `source`. Returns what the manifest records: the name of
    each description and its SHA-256."""
    kernels = chosen_kernels(source, sm)
    if source.resolve() != out.resolve():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for kernel in kernels:
            for file in (kernel.cubin, kernel.description):
                shutil.copyfile(file, out / file.name)
    return {kernel.description.name: kernel.sha256 for kernel in kernels}


def _kernel(description: Path) -> KernelFile | None:
    """None for a candidate that production does not use."""
    content, cubin = description.read_bytes(), description.with_suffix(".cubin")
    try:
        values = json.loads(content)
        chosen, expected = values["chosen"], values["cubin_sha256"]
        found = hashlib.sha256(cubin.read_bytes()).hexdigest() if chosen else expected
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{description} must describe a built kernel with its machine code beside it, could not be read ({error}): "
            "build it again with `make kernels`."
        ) from None
    if found != expected:
        raise ExportError(f"{cubin} must be the file that {description.name} describes, it is another: build it again.")
    return KernelFile(description, cubin, hashlib.sha256(content).hexdigest()) if chosen else None
