"""The package `stepvideo_kernels` is optional: only fused operators and engines with plugins need it.

Plugins find their kernels in one folder for the process. What they will look up is looked up before any engine is
loaded: TensorRT turns what a plugin raises while it runs into a refusal without a reason.
"""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepvideo_serve.engine.manifest import GraphEntry, Manifest, require_kernels_named
from stepvideo_serve.errors import EngineError, SetupError

KERNELS_PACKAGE = "stepvideo_kernels"
LOOKED_UP = "kernels"
"""Key in `GraphEntry.extras` of an engine: op, variant and constants of each kernel that its plugins look up."""


def require_kernels(who: str) -> None:
    """Raises SetupError unless the package can be imported; `who` needs it, and begins the sentence."""
    if find_spec(KERNELS_PACKAGE) is None:
        raise SetupError(
            f"{who} needs the package {KERNELS_PACKAGE}, which was not found: put the folder kernels of the checkout "
            "on PYTHONPATH."
        )


def register_plugins(trt: Any, folder: Path, entries: Mapping[str, GraphEntry], manifest: Manifest) -> None:
    """Makes our plugins known to TensorRT where one of the engines `entries` has any, and loads their kernels onto the
    current GPU. To be called before an engine is deserialised.

    trt       the imported module
    folder    the kernels of `make kernels`, the same for all engines of a process
    manifest  of the engines, which names the kernels' descriptions by hash: no other kernel is loaded
    Raises SetupError without the package, EngineError when a kernel is not in the folder or cannot be loaded.
    """
    with_plugins = {name: entry for name, entry in entries.items() if entry.extras["plan"].get("plugins")}
    if not with_plugins:
        return
    require_kernels(f"The engine {next(iter(with_plugins))}, which has plugins,")
    from stepvideo_kernels.plugins.registration import register

    described = require_kernels_named(manifest, folder.parent, next(iter(with_plugins)))
    library = _library(folder, tuple(sorted(described.items())))
    for name, entry in with_plugins.items():
        for wanted in _wanted(name, entry):
            try:
                library().find(wanted["op"], wanted["variant"], **wanted["constants"])
            except EngineError as error:
                raise EngineError(f"Engine {name} has plugins: {error}") from error
    register(trt, library)


def _wanted(name: str, entry: GraphEntry) -> list[Mapping[str, Any]]:
    wanted: list[Mapping[str, Any]] | None = entry.extras.get(LOOKED_UP)
    if not wanted:
        raise EngineError(
            f"The manifest must name the kernels of engine {name}, which has plugins, it names none: build it again."
        )
    return wanted


@cache
def _library(folder: Path, described: tuple[tuple[str, str], ...]) -> Any:
    """Gives the kernels of a folder with the hashes of their descriptions; one for the process, so that each kernel is
    loaded once."""
    from stepvideo_kernels.plugins.registration import device_kernels

    return device_kernels(folder, dict(described))
